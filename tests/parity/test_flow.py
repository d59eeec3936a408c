"""Parity with Flow-GRPO, DanceGRPO and Flow-CPS: every step's mean, std and log-prob, and the kernels' ratio."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hrf_fast.policies.flow_sampler import build_flow_sampler, flow_coefficients, published_cps_scale
from hrf_kernels import clipped_surrogate, gaussian_log_prob, gaussian_mean
from tests.parity.text_golden import read

RULES = {"flow": "flow_sde", "dance": "dance_sde", "cps": "cps"}
CASES = [f"{rule}.T{steps}.g{guidance}" for rule in RULES for steps in (6, 10) for guidance in ("4.5", "1.0")]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def load(key):
    """(facts, tensors, the T steps as published, the sampler) of a case; steps are on axis 1."""
    metadata, everything = read("flow_sde")
    facts, start = metadata["cases"][key], f"{key}."
    tensors = {name.removeprefix(start): tensor for name, tensor in everything.items() if name.startswith(start)}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(metadata["configs"]["scheduler"])
    kind, steps = RULES[facts["rule"]], facts["num_inference_steps"]
    sampler = build_flow_sampler(scheduler, kind=kind, num_inference_steps=steps, noise_level=facts["noise_level"])
    sigmas = everything[f"T{steps}.sigmas"]
    return facts, tensors, flow_coefficients(sigmas, kind=kind, noise_level=facts["noise_level"]), sampler


def inputs(tensors, step):
    """Model output, latents and next latents of a step."""
    output, latents, reached = tensors["model_output"][:, step], *tensors["latents"][:, step : step + 2].unbind(1)
    return output.contiguous(), latents.contiguous(), reached.contiguous()


@pytest.mark.parametrize("key", CASES)
def test_timesteps_and_sigmas_are_those_of_the_pipeline(key):
    facts, _, _, sampler = load(key)
    shared = read("flow_sde")[1]
    steps = facts["num_inference_steps"]
    assert torch.equal(sampler.timesteps, shared[f"T{steps}.timesteps"])
    assert torch.equal(sampler.noise, shared[f"T{steps}.sigmas"][:-1])
    close(sampler.signal, 1 - shared[f"T{steps}.sigmas"][:-1])


@pytest.mark.parametrize("key", CASES)
def test_mean_std_and_log_prob_of_every_step_are_those_published(key):
    facts, tensors, table, sampler = load(key)
    close(table.std, tensors["std"])
    for step in range(facts["num_inference_steps"]):
        output, latents, reached = inputs(tensors, step)
        close(gaussian_mean(output, latents, table[step]), tensors["mean"][:, step])
        expected = tensors["log_probs"][:, step]
        if table.std[step] == 0:
            # the last step of Flow-CPS has no density
            assert (facts["rule"], step) == ("cps", len(table) - 1) and not expected.any()
            continue
        log_prob = gaussian_log_prob(output, latents, reached, table[step], backend="eager")
        if facts["rule"] != "cps":
            close(log_prob, expected)
        else:
            # theirs is -(next - mean)^2, without the constants and without 1/(2 std^2)
            constants = table.std[step].log() + math.log(2 * math.pi) / 2
            close((log_prob + constants) * published_cps_scale(table.std[step]), expected)
    # all steps but the last, which is deterministic here
    for name, tensor in sampler.coefficients.tensors().items():
        assert torch.equal(tensor[:-1], table.tensors()[name][:-1])
    assert sampler.coefficients.std[-1] == 0 and sampler.stochastic_steps == facts["num_inference_steps"] - 1


@pytest.mark.parametrize("key", CASES)
def test_the_ratio_is_exactly_one_on_the_published_rollouts(key):
    _, tensors, _, sampler = load(key)
    for step in range(sampler.stochastic_steps):
        replayed, coefficients = inputs(tensors, step), sampler.coefficients[step]
        old = gaussian_log_prob(*replayed, coefficients, backend="eager")
        advantages = torch.tensor([1.0, -1.0])
        result = clipped_surrogate(*replayed, coefficients, old, advantages, 1e-4, backend="eager")
        assert torch.equal(result.ratio, torch.ones(2))
