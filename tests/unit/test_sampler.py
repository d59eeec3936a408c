"""Step tables against diffusers' own DDIM and DDPM steps, every step.

The oracle's alphas are the scheduler's float32 ones, continued in float64, so that its own rounding is not measured.
"""

import pytest
import torch

from hrf_fast.policies.sampler import build_sampler
from hrf_kernels import gaussian_mean
from tests.conftest import make_scheduler

# of the scale of a step's terms: three factors rounded to float32, 6e-8 each, and float32 arithmetic on large x0
TOLERANCE = 1e-6
# diffusers floors a DDPM variance at 1e-20, a std of 1e-10 where ours is 0
STD_FLOOR = 2e-10

PREDICTIONS = ("epsilon", "sample", "v_prediction")
CLIPS = ({"clip_sample": False}, {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 0.4})
# timestep_spacing and steps_offset, which only "leading" reads
SPACINGS = (("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0))
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")


def draw(shape, seed):
    """float64 latents, output and noise; the second sample's first two are zeros, so that it shows std alone."""
    generator = torch.Generator().manual_seed(seed)
    latents, output, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    latents[1], output[1] = 0, 0
    return latents, output, noise


def in_float64(oracle, num_inference_steps):
    oracle.set_timesteps(num_inference_steps)
    oracle.alphas_cumprod = oracle.alphas_cumprod.double()
    if hasattr(oracle, "final_alpha_cumprod"):
        oracle.final_alpha_cumprod = oracle.final_alpha_cumprod.double()
    return oracle


def worst_error(coefficients, timesteps, oracle_step):
    """Largest difference to `oracle_step(output, timestep, latents, seed)` -> (next, noise), in units of its terms."""
    worst = 0.0
    for i, timestep in enumerate(timesteps):
        latents, output, _ = draw((2, 1, 2, 3), seed=i)
        expected, noise = oracle_step(output, timestep, latents, i)
        c = coefficients[i]
        ours = gaussian_mean(output, latents, c) + c.std.double() * noise
        x0_scale = c.x0_latents.abs() * latents.abs() + c.x0_output.abs() * output.abs()
        scale = c.mean_x0 * x0_scale + c.mean_latents.abs() * latents.abs() + c.mean_output.abs() * output.abs()
        scale = scale + c.std * noise.abs()
        excess = ((ours - expected).abs() - STD_FLOOR * noise.abs()).clamp(min=0)
        # where every term is 0 so must be the difference
        worst = max(worst, float((excess / scale.clamp(min=1e-30)).max()))
    return worst


def ddim_error(scheduler, num_inference_steps, eta):
    from diffusers import DDIMScheduler

    sampler = build_sampler(scheduler, kind="ddim", num_inference_steps=num_inference_steps, eta=eta or 1.0)
    oracle = in_float64(DDIMScheduler.from_config(scheduler.config), num_inference_steps)
    assert sampler.timesteps.tolist() == oracle.timesteps.tolist()
    assert len(sampler) == num_inference_steps

    def step(output, timestep, latents, i):
        noise = draw(latents.shape, seed=i)[2]
        return oracle.step(output, int(timestep), latents, eta=eta, variance_noise=noise).prev_sample, noise

    table = sampler.coefficients if eta else sampler.deterministic
    return worst_error(table, oracle.timesteps, step)


def ddpm_error(scheduler, num_inference_steps):
    from diffusers import DDPMScheduler

    sampler = build_sampler(scheduler, kind="ddpm", num_inference_steps=num_inference_steps, eta=1.0)
    oracle = in_float64(DDPMScheduler.from_config(scheduler.config), num_inference_steps)
    assert sampler.timesteps.tolist() == oracle.timesteps.tolist()
    assert len(sampler) == num_inference_steps

    def step(output, timestep, latents, i):
        # the noise that the oracle draws, drawn once more
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        generator = torch.Generator().manual_seed(i)
        following = oracle.step(output, int(timestep), latents, generator=generator).prev_sample
        return following, noise if timestep > 0 else torch.zeros_like(noise)

    return worst_error(sampler.coefficients, oracle.timesteps, step)


# --- DDIM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_every_ddim_step_is_that_of_diffusers(eta, prediction, clip):
    assert ddim_error(make_scheduler(prediction_type=prediction, **clip), 20, eta) < TOLERANCE


@pytest.mark.parametrize("num_inference_steps", [7, 40])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_ddim_steps_under_every_timetable(num_inference_steps, one, spacing, offset):
    timetable = {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": one}
    for i, prediction in enumerate(PREDICTIONS):
        scheduler = make_scheduler(prediction_type=prediction, **timetable, **CLIPS[i])
        for eta in (0, 1.0):
            assert ddim_error(scheduler, num_inference_steps, eta) < TOLERANCE, (prediction, eta)


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_steps_under_every_beta_schedule(betas, prediction):
    scheduler = make_scheduler(
        beta_schedule=betas, prediction_type=prediction, timestep_spacing="trailing", beta_start=8.5e-4, beta_end=0.012
    )
    assert ddim_error(scheduler, 20, 1.0) < TOLERANCE


@pytest.mark.parametrize(("spacing", "offset"), [("leading", 1), ("trailing", 0)])
def test_a_single_ddim_step_that_keeps_some_noise(spacing, offset):
    # with set_alpha_to_one false the only step ends at the first trained alpha, so it has a std
    scheduler = make_scheduler(timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=False)
    for eta in (0, 0.5, 1.0):
        assert ddim_error(scheduler, 1, eta) < TOLERANCE


def test_ddim_steps_with_betas_given_one_by_one_and_few_trained_steps():
    scheduler = make_scheduler(num_train_timesteps=9, trained_betas=[0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5])
    for steps in (4, 9):
        assert ddim_error(scheduler, steps, 1.0) < TOLERANCE


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_zero_terminal_snr_works_with_predictions_that_can_invert_it(prediction, kind):
    scheduler_class = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}[kind]
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction}
    scheduler = make_scheduler(scheduler_class, **options)
    # pure noise: the table really holds an alpha of 0
    assert float(scheduler.alphas_cumprod[-1]) == 0
    error = ddim_error(scheduler, 10, 1.0) if kind == "ddim" else ddpm_error(scheduler, 10)
    assert error < TOLERANCE


# --- DDPM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_every_ddpm_step_is_that_of_diffusers(variance, prediction, clip):
    scheduler = make_scheduler("DDPMScheduler", variance_type=variance, prediction_type=prediction, **clip)
    assert ddpm_error(scheduler, 20) < TOLERANCE


@pytest.mark.parametrize("num_inference_steps", [7, 40])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_ddpm_steps_under_every_timetable(num_inference_steps, variance, spacing, offset):
    timetable = {"timestep_spacing": spacing, "steps_offset": offset, "variance_type": variance}
    for i, prediction in enumerate(PREDICTIONS):
        scheduler = make_scheduler("DDPMScheduler", prediction_type=prediction, **timetable, **CLIPS[i])
        assert ddpm_error(scheduler, num_inference_steps) < TOLERANCE, prediction


@pytest.mark.parametrize("betas", BETAS)
def test_ddpm_steps_under_every_beta_schedule(betas):
    assert ddpm_error(make_scheduler("DDPMScheduler", beta_schedule=betas), 20) < TOLERANCE


def test_a_single_ddpm_step_of_large_variance():
    # one step from timestep 999 to the clean image has the variance 1 − ā_999, nearly 1
    scheduler = make_scheduler("DDPMScheduler", variance_type="fixed_large", timestep_spacing="trailing")
    assert ddpm_error(scheduler, 1) < TOLERANCE


def test_ddpm_steps_over_the_whole_training_schedule():
    assert ddpm_error(make_scheduler("DDPMScheduler", num_train_timesteps=50, beta_end=0.2), 50) < TOLERANCE


# --- a sampler other than the model's own -----------------------------------------------------------------------------


def test_a_ddpm_model_is_sampled_with_ddim_steps_and_the_other_way_round():
    assert ddim_error(make_scheduler("DDPMScheduler", clip_sample_range=0.7), 20, 1.0) < TOLERANCE
    assert ddpm_error(make_scheduler("DDIMScheduler", clip_sample_range=0.7), 20) < TOLERANCE


def test_a_pndm_model_keeps_its_lack_of_a_clamp():
    # PNDM has no clip_sample; diffusers' DDIM would clamp by default, on a model that never was clamped
    sampler = build_sampler(make_scheduler("PNDMScheduler"), kind="ddim", num_inference_steps=10, eta=1.0)
    assert sampler.coefficients.x0_clip is None and sampler.deterministic.x0_clip is None


def test_a_pndm_config_that_says_clip_sample_is_clamped_at_diffusers_default():
    from diffusers import PNDMScheduler

    # such files exist: the option is kept from the scheduler that the model was trained with
    scheduler = PNDMScheduler.from_config({"clip_sample": True, "beta_start": 1e-4, "beta_end": 0.02})
    sampler = build_sampler(scheduler, kind="ddim", num_inference_steps=10, eta=1.0)
    assert sampler.coefficients.x0_clip == 1.0


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_the_tables_that_search_and_anchor_are_ddim_without_noise(kind):
    # eta 0 whatever the training sampler: std 0 at every step, the same x0
    scheduler_class = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}[kind]
    scheduler = make_scheduler(scheduler_class)
    sampler = build_sampler(scheduler, kind=kind, num_inference_steps=20, eta=1.0)
    assert sampler.deterministic.std.tolist() == [0.0] * 20
    assert ddim_error(scheduler, 20, 0) < TOLERANCE
    reference = build_sampler(make_scheduler(), kind="ddim", num_inference_steps=20, eta=0.5)
    for name in ("x0_latents", "x0_output", "mean_x0", "mean_latents", "mean_output"):
        assert torch.equal(getattr(sampler.deterministic, name), getattr(reference.deterministic, name))
