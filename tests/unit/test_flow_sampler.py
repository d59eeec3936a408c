"""Samplers of flow-matching models by hand arithmetic, against diffusers' own pipelines, and what is refused."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from hrf_fast.config.options import SampleConfig
from hrf_fast.policies.flow_sampler import (
    build_flow_sampler,
    choose_sampler,
    dynamic_shift,
    flow_coefficients,
    published_cps_scale,
    scheduler_sigmas,
)
from hrf_kernels import gaussian_mean
from tests.conftest import make_scheduler


def flow(**options):
    return FlowMatchEulerDiscreteScheduler(**options)


def build(kind="flow_sde", steps=6, noise_level=None, **options):
    return build_flow_sampler(flow(**options), kind=kind, num_inference_steps=steps, noise_level=noise_level)


@pytest.mark.parametrize(
    ("kind", "level", "latents", "output", "std"),
    [
        ("ode", 0.0, [1, 1], [-0.5, -0.5], [0, 0]),
        # s^2 = .49 * 1 / (1 - .5) = .98 at sigma 1, .49 at sigma .5; 1 - .98 * .5 / 2, 1 - .49 * .5 / (2 * .5);
        # -.5 * (1 + .49 * .5 / (2 * .5)); sqrt(.98 * .5), sqrt(.49 * .5)
        ("flow_sde", 0.7, [0.755, 0.755], [-0.5, -0.62250], [0.7, 0.4949747]),
        # s^2 = .09: 1 - .09 * .5 / 2, 1 - .09 * .5 / (2 * .5); -.5 * (1 + .09 * .5 / (2 * .5)); .3 * sqrt(.5)
        ("dance_sde", 0.3, [0.9775, 0.955], [-0.5, -0.52250], [0.2121320, 0.2121320]),
        # theta = pi / 2: cos 0, sin 1
        ("cps", 1.0, [0.5, 1.0], [-0.5, -0.5], [0.5, 0]),
        # theta = pi / 3: .5 + .5 * .5, 1; -.5, -.5; .5 * sin(pi / 3), 0
        ("cps", 2 / 3, [0.75, 1.0], [-0.5, -0.5], [0.4330127, 0]),
    ],
)
def test_two_steps_by_hand(kind, level, latents, output, std):
    table = flow_coefficients(torch.tensor([1.0, 0.5, 0.0]), kind=kind, noise_level=level)
    for ours, expected in ((table.mean_latents, latents), (table.mean_output, output), (table.std, std)):
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6)
    assert not table.mean_x0.any() and table.x0_clip is None


def test_the_last_step_is_the_ode_and_in_no_window():
    for kind in ("flow_sde", "dance_sde", "cps"):
        sampler = build(kind)
        assert sampler.stochastic_steps == 5 and sampler.coefficients.std[:5].min() > 0
        for name, tensor in sampler.coefficients.tensors().items():
            assert torch.equal(tensor[5], sampler.deterministic.tensors()[name][5])
    assert not build().deterministic.std.any()


def test_samples_are_renoised_on_a_line_and_the_clean_image_is_found_again():
    sampler = build(shift=3.0)
    x0, noise = (torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for step in range(6):
        noisy = sampler.renoise(x0, step, noise)
        sigma = float(sampler.noise[step])
        torch.testing.assert_close(noisy, (1 - sigma) * x0 + sigma * noise, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gaussian_mean(noise - x0, noisy, sampler.clean[step]), x0, rtol=1e-5, atol=1e-5)
    assert sampler.timesteps.dtype == torch.float32
    torch.testing.assert_close(sampler.timesteps, 1000 * sampler.noise)


def test_noise_levels_are_by_default_those_published():
    for kind, level in (("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8)):
        assert torch.equal(build(kind).coefficients.std, build(kind, noise_level=level).coefficients.std)
        assert not torch.equal(build(kind).coefficients.std, build(kind, noise_level=level / 2).coefficients.std)


def test_published_cps_log_probs_are_on_another_scale():
    # (next - mean)^2 of 0.04 at std 0.5 is 0.08 in ours
    scale = float(published_cps_scale(torch.tensor(0.5)))
    assert 0.04 / (2 * 0.5**2) * scale == pytest.approx(0.04)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
@pytest.mark.parametrize("linear", [True, False])
def test_a_dynamic_shift_is_that_of_the_pipelines(tokens, linear):
    scheduler, theirs = (flow(use_dynamic_shifting=True, shift=3.0) for _ in range(2))
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    assert dynamic_shift(scheduler.config, tokens) == pytest.approx(mu)
    sigmas = np.linspace(1.0, 1 / 7, 7) if linear else None
    retrieve_timesteps(theirs, 7, "cpu", sigmas=sigmas, mu=mu)
    timesteps, levels = scheduler_sigmas(scheduler, num_inference_steps=7, image_tokens=tokens, linear_sigmas=linear)
    torch.testing.assert_close(levels, theirs.sigmas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(timesteps, theirs.timesteps, rtol=1e-6, atol=1e-4)


def test_the_model_says_which_samplers_it_has():
    for kind in ("ddim", "ddpm", "ddim_trl"):
        with pytest.raises(ValueError, match=rf"sample.scheduler is '{kind}'.*use one of flow_sde, dance_sde, cps"):
            choose_sampler(flow(), SampleConfig(kind, 6))
    with pytest.raises(ValueError, match=r"sample.scheduler is 'cps'.*DDIMScheduler; use one of ddim, ddpm"):
        choose_sampler(make_scheduler(), SampleConfig("cps", 6))
    assert choose_sampler(flow(), SampleConfig("cps", 6)).stochastic_steps == 5
    assert choose_sampler(make_scheduler(), SampleConfig("ddim", 6)).timesteps.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "sample.num_inference_steps is 1; use 2 to 1000"),
        ({"steps": 1001}, "sample.num_inference_steps is 1001; use 2 to 1000"),
        (
            {"shift": 1e9},
            "sample.num_inference_steps is 6.*shift 1000000000.0.*do not fall.*but are 1, 1, 1",
        ),
        ({"shift": 0.0}, "shift 0.0"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting: true"),
        ({"noise_level": 0.0}, "sample.noise_level is 0.0.*above 0"),
        ({"noise_level": math.inf}, "sample.noise_level is inf.*above 0"),
        ({"kind": "cps", "noise_level": 1.2}, r"sample.noise_level is 1.2; cps needs noise: use a value in \(0, 1\]"),
        ({"kind": "dance_sde", "noise_level": 1e-7}, "sample.noise_level is 1e-07.*use at least"),
        ({"kind": "ode"}, "sample.scheduler is 'ode'"),
    ],
)
def test_what_has_no_flow_sampler_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
