"""Step tables by hand, their deterministic steps, re-noising, and the options that are refused by name."""

import pytest
import torch

from hrf_fast.policies.sampler import build_sampler
from hrf_kernels import gaussian_mean
from tests.conftest import make_scheduler
from tests.unit.test_sampler import TOLERANCE, ddpm_error, draw

# --- by hand ----------------------------------------------------------------------------------------------------------


def two_step_scheduler(kind="DDIMScheduler", **options):
    """Trained betas 0.36 and 0.75: alphas 0.64 and 0.64·0.25 = 0.16."""
    return make_scheduler(kind, num_train_timesteps=2, trained_betas=[0.36, 0.75], clip_sample=False, **options)


def test_a_ddim_step_by_hand():
    # ā 0.16 → 0.64: σ² = eta²·(0.36/0.84)·(1 − 0.25) = eta²·0.3214286; x0 = x/0.4 − sqrt(0.84)/0.4·m;
    # mean = 0.8·x0 + sqrt(0.36 − σ²)·m; eta 0.5: σ² = 0.0803571, direction sqrt(0.2796429)
    c = build_sampler(two_step_scheduler(), kind="ddim", num_inference_steps=2, eta=0.5).coefficients[0]
    found = [float(v) for v in (c.x0_latents, c.x0_output, c.mean_x0, c.mean_latents, c.mean_output, c.std)]
    assert found == pytest.approx([2.5, -2.2912878, 0.8, 0.0, 0.5288127, 0.2834734], rel=1e-6)


def test_an_ancestral_step_by_hand():
    # q(x_0 | x_1, x0): 0.8·0.75/0.84·x0 + 0.5·0.36/0.84·x, variance 0.36/0.84·0.75
    scheduler = two_step_scheduler("DDPMScheduler")
    c = build_sampler(scheduler, kind="ddpm", num_inference_steps=2, eta=1.0).coefficients[0]
    found = [float(v) for v in (c.x0_latents, c.x0_output, c.mean_x0, c.mean_latents, c.mean_output, c.std)]
    assert found == pytest.approx([2.5, -2.2912878, 0.7142857, 0.2142857, 0.0, 0.5669467], rel=1e-6)


def test_ddim_with_eta_one_and_ancestral_sampling_are_the_same_gaussian_without_a_clamp():
    # both are the DDPM posterior when steps are consecutive: same std, same mean for the same inputs
    latents, output, _ = draw((2, 1, 4, 4), seed=0)
    ddim = build_sampler(two_step_scheduler(), kind="ddim", num_inference_steps=2, eta=1.0).coefficients[0]
    ddpm = build_sampler(two_step_scheduler("DDPMScheduler"), kind="ddpm", num_inference_steps=2, eta=1.0).coefficients[
        0
    ]
    torch.testing.assert_close(ddim.std, ddpm.std)
    torch.testing.assert_close(
        gaussian_mean(output, latents, ddim), gaussian_mean(output, latents, ddpm), atol=1e-6, rtol=0
    )


# --- degenerate steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "kind", "options", "stochastic"),
    [
        ("DDIMScheduler", "ddim", {}, 9),  # the last step ends at alpha 1: no noise
        ("DDIMScheduler", "ddim", {"set_alpha_to_one": False}, 9),  # from timestep 0 to ā_0, itself
        ("DDIMScheduler", "ddim", {"set_alpha_to_one": False, "steps_offset": 1}, 10),  # from timestep 1 to ā_0
        ("DDIMScheduler", "ddim", {"timestep_spacing": "trailing"}, 9),
        ("DDPMScheduler", "ddpm", {}, 9),  # timestep 0 adds no noise
        ("DDPMScheduler", "ddpm", {"variance_type": "fixed_large"}, 9),
        ("DDPMScheduler", "ddpm", {"timestep_spacing": "trailing"}, 9),  # timestep 99, variance floored at 1e-20
        ("DDPMScheduler", "ddpm", {"timestep_spacing": "trailing", "variance_type": "fixed_large"}, 10),
    ],
)
def test_degenerate_steps_are_outside_the_stochastic_ones(scheduler, kind, options, stochastic):
    sampler = build_sampler(make_scheduler(scheduler, **options), kind=kind, num_inference_steps=10, eta=1.0)
    assert sampler.stochastic_steps == stochastic
    assert (sampler.coefficients.std[:stochastic] > 1e-3).all()
    assert sampler.coefficients.std[stochastic:].tolist() == [0.0] * (10 - stochastic)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_sampler_without_a_stochastic_step_is_refused(spacing):
    # one step straight to alpha 1 has no noise and so no policy
    with pytest.raises(ValueError, match=r"sample\.num_inference_steps is 1\b"):
        build_sampler(make_scheduler(timestep_spacing=spacing), kind="ddim", num_inference_steps=1, eta=1.0)


def test_noise_below_the_rounding_of_float32_is_refused_with_an_eta_that_suffices():
    def build(eta):
        return build_sampler(make_scheduler(), kind="ddim", num_inference_steps=10, eta=eta)

    # std grows with eta, and its least with eta 1 is s: an eta under 1e-6 / s is refused
    least = float(build(1.0).coefficients.std[:9].min())
    assert 1e-3 < least < 0.1
    with pytest.raises(ValueError, match=r"sample.eta is 1e-06.* std .*use at least") as caught:
        build(1e-6)
    suggested = float(str(caught.value).rsplit(" ", 1)[1])
    assert 1e-6 / least <= suggested < 1.2e-6 / least
    assert build(suggested).stochastic_steps == 9
    with pytest.raises(ValueError, match="use at least"):
        build(0.8e-6 / least)


# numpy.arange(1000, 0, −1000/T) has an element too many for 62 of the T up to 1000, because of rounding
@pytest.mark.parametrize("num_inference_steps", [61, 103, 121])
def test_trailing_timesteps_are_as_many_as_asked_for_and_none_is_negative(num_inference_steps):
    scheduler = make_scheduler(timestep_spacing="trailing")
    try:
        sampler = build_sampler(scheduler, kind="ddim", num_inference_steps=num_inference_steps, eta=1.0)
    except ValueError as error:
        # refusing it by name is as good
        assert "sample.num_inference_steps" in str(error)
        return
    # timestep −1 would read the alpha of the noisiest step for the cleanest
    assert int(sampler.timesteps.min()) >= 0
    assert len(sampler) == num_inference_steps
    assert sampler.stochastic_steps == num_inference_steps - 1


# --- re-noising -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_renoising_is_that_of_diffusers_at_every_step(scheduler, spacing):
    scheduler = make_scheduler(scheduler, timestep_spacing=spacing)
    sampler = build_sampler(scheduler, kind="ddim", num_inference_steps=7, eta=1.0)
    x0, noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3, 4, 4)
    for step, timestep in enumerate(sampler.timesteps):
        expected = scheduler.add_noise(x0, noise, timestep[None])
        torch.testing.assert_close(sampler.renoise(x0, step, noise), expected, atol=2e-6, rtol=1e-6)


def test_renoising_by_hand():
    # ā 0.16: 0.4·x0 + sqrt(0.84)·noise; ā 0.64: 0.8·x0 + 0.6·noise
    sampler = build_sampler(two_step_scheduler(), kind="ddim", num_inference_steps=2, eta=1.0)
    x0, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    assert float(sampler.renoise(x0, 0, noise)) == pytest.approx(0.8 - 0.9165151)
    assert float(sampler.renoise(x0, 1, noise)) == pytest.approx(1.6 - 0.6)


@pytest.mark.parametrize(("clip", "expected"), [(False, 5.0 + 2.2912878), (True, 0.5)])
def test_the_estimate_of_the_clean_image_by_hand(clip, expected):
    # ā 0.16: x0 = 2.5·x − 2.2912878·m with x = 2, m = −1; at step 1, ā 0.64: 1.25·2 + 0.75 = 3.25
    options = {"clip_sample": True, "clip_sample_range": 0.5} if clip else {}
    scheduler = make_scheduler(num_train_timesteps=2, trained_betas=[0.36, 0.75], **{"clip_sample": False, **options})
    sampler = build_sampler(scheduler, kind="ddim", num_inference_steps=2, eta=1.0)
    latents, output = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    found = [float(gaussian_mean(output, latents, sampler.clean[step])) for step in (0, 1)]
    assert found == pytest.approx([expected, 0.5 if clip else 3.25], rel=1e-6)


def test_tables_are_float32_and_move_together():
    sampler = build_sampler(make_scheduler(), kind="ddim", num_inference_steps=7, eta=1.0).to(torch.device("meta"))
    tensors = [sampler.signal, sampler.noise, sampler.coefficients.std, sampler.deterministic.mean_x0]
    assert all(tensor.dtype == torch.float32 and tensor.device.type == "meta" for tensor in tensors)
    assert sampler.timesteps.dtype == torch.int64 and sampler.timesteps.device.type == "meta"
    assert (sampler.stochastic_steps, sampler.coefficients.x0_clip) == (6, 1.0)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "options", "arguments", "message"),
    [
        ("DDIMScheduler", {"thresholding": True}, {}, "thresholding: true"),
        ("DDIMScheduler", {"prediction_type": "flow"}, {}, "prediction_type is 'flow'"),
        ("DDIMScheduler", {}, {"kind": "euler"}, r"sample\.scheduler is 'euler'"),
        ("DDIMScheduler", {}, {"eta": 0.0}, r"sample\.eta is 0\.0"),
        ("DDIMScheduler", {}, {"eta": -0.5}, r"sample\.eta is -0\.5"),
        ("DDIMScheduler", {}, {"eta": 1.5}, r"sample\.eta is 1\.5"),
        ("DDIMScheduler", {}, {"eta": float("nan")}, r"sample\.eta is nan"),
        ("DDPMScheduler", {}, {"kind": "ddpm", "eta": 0.5}, r"sample\.eta is 0\.5"),
        ("DDIMScheduler", {}, {"num_inference_steps": 0}, r"sample\.num_inference_steps is 0.* 1000"),
        ("DDIMScheduler", {}, {"num_inference_steps": -3}, r"sample\.num_inference_steps is -3.* 1000"),
        ("DDIMScheduler", {}, {"num_inference_steps": 1001}, r"sample\.num_inference_steps is 1001.* 1000"),
    ],
)
def test_what_the_affine_step_cannot_express_is_refused_by_name(scheduler, options, arguments, message):
    scheduler = make_scheduler(scheduler, **options)
    with pytest.raises(ValueError, match=message):
        build_sampler(scheduler, **{"kind": "ddim", "num_inference_steps": 10, "eta": 1.0, **arguments})


@pytest.mark.parametrize("variance", ["learned", "learned_range", "fixed_large_log"])
def test_variances_that_ancestral_sampling_cannot_fix_are_refused(variance):
    scheduler = make_scheduler("DDPMScheduler", variance_type=variance)
    with pytest.raises(ValueError, match=f"variance_type is '{variance}'.*fixed_small.*fixed_large"):
        build_sampler(scheduler, kind="ddpm", num_inference_steps=10, eta=1.0)


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_zero_terminal_snr_is_refused_with_epsilon_prediction(kind):
    # x0 = (x − m)/0: nothing of the image is in x
    scheduler = make_scheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="rescale_betas_zero_snr.*epsilon"):
        build_sampler(scheduler, kind=kind, num_inference_steps=10, eta=1.0)


def test_timesteps_pushed_past_the_trained_ones_are_refused_by_name():
    # leading spacing of all 1000 steps plus steps_offset 1 ends at timestep 1000, which was never trained
    scheduler = make_scheduler(steps_offset=1)
    with pytest.raises(ValueError, match=r"steps_offset|num_inference_steps"):
        build_sampler(scheduler, kind="ddim", num_inference_steps=1000, eta=1.0)


def test_ancestral_sampling_of_a_beta_schedule_that_only_ddpm_has():
    # sigmoid betas are plain DDPM in diffusers; that DDIMScheduler does not know them must not stop ddpm sampling, or
    # must be said by name
    scheduler = make_scheduler("DDPMScheduler", beta_schedule="sigmoid")
    try:
        error = ddpm_error(scheduler, 10)
    except ValueError as refusal:
        assert "sigmoid" in str(refusal)
        return
    assert error < TOLERANCE
