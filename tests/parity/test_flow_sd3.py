"""Parity with Flow-GRPO on SD3: velocities, log-probs and ratios under new weights, and the gradient."""

import functools

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from hrf_fast.policies.base import Condition
from hrf_fast.policies.calling import shape_of
from hrf_fast.policies.families.sd3 import STABLE_DIFFUSION_3
from hrf_fast.policies.flow_sampler import build_flow_sampler, flow_coefficients
from hrf_fast.policies.text_to_image import TextToImagePolicy
from hrf_kernels import clipped_surrogate, gaussian_log_prob
from tests.parity.text_golden import LOG_PROBS, close, module, read

CASES = ["flow.T6.g4.5", "flow.T6.g1.0", "flow.T10.g4.5"]
GRADIENT_TOLERANCE = 1e-3


def load(key):
    """(facts, time-major tensors of a case, its steps as published)."""
    metadata, tensors = read("flow_sde")
    facts, start = metadata["cases"][key], f"{key}."
    case = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    for name in ("latents", "model_output", "log_probs", "new.log_probs", "new.ratio"):
        case[name] = case[name].transpose(0, 1).contiguous()
    sigmas = tensors[f"T{facts['num_inference_steps']}.sigmas"]
    return facts, case, flow_coefficients(sigmas, kind="flow_sde", noise_level=facts["noise_level"])


@functools.cache
def policy(key, prefix):
    """The golden SD3 with the weights of a prefix, without its text encoders."""
    metadata, _ = read("flow_sde")
    configs, facts = metadata["configs"], metadata["cases"][key]
    transformer = module("flow_sde", SD3Transformer2DModel, configs["transformer"], prefix)
    vae = module("flow_sde", AutoencoderKL, configs["vae"], "vae")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(configs["scheduler"])
    steps = facts["num_inference_steps"]
    return TextToImagePolicy(
        transformer,
        scheduler,
        build_flow_sampler(scheduler, kind="flow_sde", num_inference_steps=steps, noise_level=facts["noise_level"]),
        None,
        vae,
        pipeline="StableDiffusion3Pipeline",
        parts={},
        denoiser="transformer",
        shape=shape_of("golden", STABLE_DIFFUSION_3.layout, transformer.config, vae.config),
        guidance_scale=facts["guidance_scale"],
    )


def condition(scale):
    tensors = read("flow_sde")[1]
    names = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    positive, negative = (
        {name: tensors[f"{start}{key}"] for name, key in names.items()} for start in ("", "negative_")
    )
    return Condition(positive, negative if scale > 1 else {})


@pytest.mark.parametrize("key", CASES)
def test_velocities_log_probs_and_ratios_are_those_of_flow_grpo(key):
    facts, case, table = load(key)
    rows = condition(facts["guidance_scale"])
    old, new = (policy(key, prefix) for prefix in ("transformer", "transformer_new"))
    with torch.no_grad():
        for step in range(len(table)):
            latents, reached = case["latents"][step : step + 2]
            close(old.predict(latents, step, rows).combined, case["model_output"][step])
            output = new.predict(latents, step, rows).combined
            log_prob = gaussian_log_prob(output, latents, reached, table[step])
            torch.testing.assert_close(log_prob, case["new.log_probs"][step], rtol=0, atol=LOG_PROBS)
            ratio = (log_prob - case["log_probs"][step]).exp()
            torch.testing.assert_close(ratio, case["new.ratio"][step], rtol=0, atol=LOG_PROBS)
    # the picture of the last latents
    close(old.decode(case["latents"][-1]), case["image"])


@pytest.mark.parametrize("detached", [False, True])
def test_the_gradient_is_that_of_the_whole_guided_velocity_and_flow_grpos_without_the_unconditional_half(detached):
    key = "flow.T6.g4.5"
    facts, case, table = load(key)
    rows, new = condition(facts["guidance_scale"]), policy(key, "transformer_new")
    new.unet.zero_grad()
    advantages = read("flow_sde")[1]["advantages_for_grad"]
    for step in range(len(table)):
        latents, reached = case["latents"][step : step + 2]
        prediction = new.predict(latents, step, rows)
        unconditional = prediction.unconditional_output
        result = clipped_surrogate(
            prediction.model_output,
            latents,
            reached,
            table[step],
            case["log_probs"][step],
            advantages,
            facts["clip_range"],
            unconditional_output=unconditional.detach() if detached else unconditional,
            guidance_scale=prediction.guidance_scale,
        )
        torch.testing.assert_close(result.loss.mean(), case["new.loss"][step], rtol=0, atol=5e-6)
        result.loss.mean().backward()
    start = "new.grad." if detached else "new.grad_no_detach."
    theirs = {name.removeprefix(start): tensor for name, tensor in case.items() if name.startswith(start)}
    ours = {name: weight.grad for name, weight in new.unet.named_parameters()}
    assert theirs.keys() == ours.keys()
    flat = [torch.cat([tensors[name].flatten() for name in sorted(theirs)]) for tensors in (ours, theirs)]
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < GRADIENT_TOLERANCE
