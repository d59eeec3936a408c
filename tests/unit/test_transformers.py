"""SD3 and FLUX: the pipelines' own embeddings, latents and images."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

from hrf_fast.noise import NoiseKey
from hrf_fast.policies import compilation
from hrf_fast.policies.files import read_model
from hrf_fast.policies.sample import starting_noise
from hrf_fast.policies.untrained import frozen_bytes, untrained_condition, untrained_network
from hrf_fast.prompts import Prompt
from hrf_kernels import gaussian_mean
from tests.flow_models import KINDS, SIDE, SIZE, flow_model, load_flow_policy, load_pipeline, size_of
from tests.loading import load_policy

TEXTS, NEGATIVES = ["a red cat", "dog"], ["red", ""]


def prompts():
    return [Prompt(*texts) for texts in zip(TEXTS, NEGATIVES, strict=True)]


@torch.no_grad()
def ode(policy, condition, latents):
    """Clean latents by the deterministic rule."""
    for step in range(len(policy.sampler)):
        latents = gaussian_mean(
            policy.predict(latents, step, condition).combined, latents, policy.sampler.deterministic[step]
        )
    return latents


@pytest.mark.parametrize(
    ("kind", "guided", "tokens"),
    [*((kind, True, {}) for kind in KINDS), ("sd3", False, {}), ("flux", False, {})]
    + [(kind, True, {"max_sequence_length": 9}) for kind in ("sd3", "sd3_no_t5", "flux")],
)
def test_without_noise_the_policy_draws_what_the_pipeline_draws(kind, guided, tokens):
    options = tokens if guided else {"guidance_scale": 1.0}
    policy, pipeline = load_flow_policy(kind, **options), load_pipeline(flow_model(kind), kind)
    start = starting_noise(policy, NoiseKey(0, torch.arange(2)))
    negative = {"negative_prompt": NEGATIVES} if kind.startswith("sd3") else {}

    def draw(output):
        return pipeline(
            TEXTS,
            num_inference_steps=4,
            guidance_scale=policy.guidance_scale,
            latents=start.clone(),
            height=SIZE,
            width=SIZE,
            output_type=output,
            **negative,
            **tokens,
        ).images

    latents = ode(policy, policy.condition(prompts()), start)
    torch.testing.assert_close(latents, draw("latent"), rtol=1e-5, atol=1e-5)
    assert torch.equal(policy.sampler.timesteps, pipeline.scheduler.timesteps)
    images = torch.from_numpy(draw("np")).permute(0, 3, 1, 2)
    assert images.shape == (2, 3, 2 * SIDE, 2 * SIDE)
    torch.testing.assert_close(policy.decode(latents), images, rtol=0, atol=1e-5)


def test_sd3_that_was_saved_with_the_tokenizer_of_a_t5_that_it_lacks_draws_what_the_pipeline_draws(tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(flow_model("sd3"), text_encoder_3=None)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder_3"] == [None, None] and index["tokenizer_3"][0] == "transformers"
    policy = load_policy(str(tmp_path), scheduler="flow_sde", num_inference_steps=4, guidance_scale=3.5)
    start = starting_noise(policy, NoiseKey(0, torch.arange(2)))
    options = {"num_inference_steps": 4, "guidance_scale": 3.5, "height": SIZE, "width": SIZE}
    theirs = pipeline(TEXTS, negative_prompt=NEGATIVES, latents=start.clone(), output_type="latent", **options).images
    torch.testing.assert_close(ode(policy, policy.condition(prompts()), start), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [None, 9])
@pytest.mark.parametrize("kind", ["sd3_no_t5", "sd35", "flux", "schnell"])
def test_a_plan_sees_the_shapes_of_the_model_itself(kind, tokens):
    files = read_model(str(flow_model(kind)), weights=False, max_sequence_length=tokens)
    policy = load_flow_policy(kind, max_sequence_length=tokens)
    network, shape = untrained_network(files, size_of(kind))
    assert shape == policy.latent_shape
    ours, theirs = ({n: w.shape for n, w in each.named_parameters()} for each in (network, policy.network))
    assert ours == theirs
    for guided in (True, False):
        ours, theirs = untrained_condition(files, 3, guided).inputs, policy.condition([None] * 3, guided=guided).inputs
        assert {n: rows.shape for n, rows in ours.items()} == {n: rows.shape for n, rows in theirs.items()}
    frozen = [module for module in policy._parts.values() if isinstance(module, torch.nn.Module)]
    weights = [weight for module in frozen for weight in module.parameters()]
    assert sum(frozen_bytes(files).values()) == sum(weight.nbytes for weight in weights)


def test_rounded_weights_are_not_held_until_the_end_of_a_call():
    policy, held = load_flow_policy("flux", precision="bf16"), []
    policy.unet.proj_out.register_forward_pre_hook(lambda *_: held.append(torch.is_autocast_cache_enabled()))
    policy.predict(starting_noise(policy, NoiseKey(0, torch.arange(1))), 1, policy.condition([None]))
    assert held == [False]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["unet", "blocks"])
@pytest.mark.parametrize("kind", ["sd35", "flux"])
def test_compiled_calls_are_the_plain_ones_for_any_batch(kind, mode, monkeypatch):
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", backend)
    policy, plain = load_flow_policy(kind, guidance_scale=1.0), load_flow_policy(kind, guidance_scale=1.0)
    policy.compile(mode)
    assert len(policy.blocks()) == 2
    for count in (3, 2, 4):
        condition = plain.condition([Prompt("cat"), Prompt("dog"), Prompt("a"), Prompt("red")][:count])
        latents = starting_noise(plain, NoiseKey(0, torch.arange(count)))
        with torch.no_grad():
            ours, theirs = (each.predict(latents, 1, condition).combined for each in (policy, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(made) == {"unet": 1, "blocks": 2}[mode]
