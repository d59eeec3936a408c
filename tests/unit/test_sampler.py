"""Step tables against diffusers' own DDIM and DDPM steps, every step, and the options that are refused by name.

The oracle's alphas are the scheduler's float32 ones, continued in float64, so that its own rounding is not measured.
"""

import pytest
import torch

from hrf_fast.policies.sampler import build_diffusion
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

    diffusion = build_diffusion(scheduler, sampler="ddim", num_inference_steps=num_inference_steps, eta=eta or 1.0)
    oracle = in_float64(DDIMScheduler.from_config(scheduler.config), num_inference_steps)
    assert diffusion.timesteps.tolist() == oracle.timesteps.tolist()
    assert len(diffusion) == num_inference_steps

    def step(output, timestep, latents, i):
        noise = draw(latents.shape, seed=i)[2]
        return oracle.step(output, int(timestep), latents, eta=eta, variance_noise=noise).prev_sample, noise

    table = diffusion.coefficients if eta else diffusion.deterministic
    return worst_error(table, oracle.timesteps, step)


def ddpm_error(scheduler, num_inference_steps):
    from diffusers import DDPMScheduler

    diffusion = build_diffusion(scheduler, sampler="ddpm", num_inference_steps=num_inference_steps, eta=1.0)
    oracle = in_float64(DDPMScheduler.from_config(scheduler.config), num_inference_steps)
    assert diffusion.timesteps.tolist() == oracle.timesteps.tolist()
    assert len(diffusion) == num_inference_steps

    def step(output, timestep, latents, i):
        # the noise that the oracle draws, drawn once more
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        generator = torch.Generator().manual_seed(i)
        following = oracle.step(output, int(timestep), latents, generator=generator).prev_sample
        return following, noise if timestep > 0 else torch.zeros_like(noise)

    return worst_error(diffusion.coefficients, oracle.timesteps, step)


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
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_zero_terminal_snr_works_with_predictions_that_can_invert_it(prediction, sampler):
    kind = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}[sampler]
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction}
    scheduler = make_scheduler(kind, **options)
    # pure noise: the table really holds an alpha of 0
    assert float(scheduler.alphas_cumprod[-1]) == 0
    error = ddim_error(scheduler, 10, 1.0) if sampler == "ddim" else ddpm_error(scheduler, 10)
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
    diffusion = build_diffusion(make_scheduler("PNDMScheduler"), sampler="ddim", num_inference_steps=10, eta=1.0)
    assert diffusion.coefficients.x0_clip is None and diffusion.deterministic.x0_clip is None


def test_a_pndm_config_that_says_clip_sample_is_clamped_at_diffusers_default():
    from diffusers import PNDMScheduler

    # such files exist: the option is kept from the scheduler that the model was trained with
    scheduler = PNDMScheduler.from_config({"clip_sample": True, "beta_start": 1e-4, "beta_end": 0.02})
    diffusion = build_diffusion(scheduler, sampler="ddim", num_inference_steps=10, eta=1.0)
    assert diffusion.coefficients.x0_clip == 1.0


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_tables_that_search_and_anchor_are_ddim_without_noise(sampler):
    # eta 0 whatever the training sampler: std 0 at every step, the same x0
    kind = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}[sampler]
    scheduler = make_scheduler(kind)
    diffusion = build_diffusion(scheduler, sampler=sampler, num_inference_steps=20, eta=1.0)
    assert diffusion.deterministic.std.tolist() == [0.0] * 20
    assert ddim_error(scheduler, 20, 0) < TOLERANCE
    reference = build_diffusion(make_scheduler(), sampler="ddim", num_inference_steps=20, eta=0.5)
    for name in ("x0_latents", "x0_output", "mean_x0", "mean_latents", "mean_output"):
        assert torch.equal(getattr(diffusion.deterministic, name), getattr(reference.deterministic, name))


# --- by hand ----------------------------------------------------------------------------------------------------------


def two_step_scheduler(kind="DDIMScheduler", **options):
    """Trained betas 0.36 and 0.75: alphas 0.64 and 0.64·0.25 = 0.16."""
    return make_scheduler(kind, num_train_timesteps=2, trained_betas=[0.36, 0.75], clip_sample=False, **options)


def test_a_ddim_step_by_hand():
    # ā 0.16 → 0.64: σ² = eta²·(0.36/0.84)·(1 − 0.25) = eta²·0.3214286; x0 = x/0.4 − sqrt(0.84)/0.4·m;
    # mean = 0.8·x0 + sqrt(0.36 − σ²)·m; eta 0.5: σ² = 0.0803571, direction sqrt(0.2796429)
    c = build_diffusion(two_step_scheduler(), sampler="ddim", num_inference_steps=2, eta=0.5).coefficients[0]
    found = [float(v) for v in (c.x0_latents, c.x0_output, c.mean_x0, c.mean_latents, c.mean_output, c.std)]
    assert found == pytest.approx([2.5, -2.2912878, 0.8, 0.0, 0.5288127, 0.2834734], rel=1e-6)


def test_an_ancestral_step_by_hand():
    # q(x_0 | x_1, x0): 0.8·0.75/0.84·x0 + 0.5·0.36/0.84·x, variance 0.36/0.84·0.75
    scheduler = two_step_scheduler("DDPMScheduler")
    c = build_diffusion(scheduler, sampler="ddpm", num_inference_steps=2, eta=1.0).coefficients[0]
    found = [float(v) for v in (c.x0_latents, c.x0_output, c.mean_x0, c.mean_latents, c.mean_output, c.std)]
    assert found == pytest.approx([2.5, -2.2912878, 0.7142857, 0.2142857, 0.0, 0.5669467], rel=1e-6)


def test_ddim_with_eta_one_and_ancestral_sampling_are_the_same_gaussian_without_a_clamp():
    # both are the DDPM posterior when steps are consecutive: same std, same mean for the same inputs
    latents, output, _ = draw((2, 1, 4, 4), seed=0)
    ddim = build_diffusion(two_step_scheduler(), sampler="ddim", num_inference_steps=2, eta=1.0).coefficients[0]
    ddpm = build_diffusion(
        two_step_scheduler("DDPMScheduler"), sampler="ddpm", num_inference_steps=2, eta=1.0
    ).coefficients[0]
    torch.testing.assert_close(ddim.std, ddpm.std)
    torch.testing.assert_close(
        gaussian_mean(output, latents, ddim), gaussian_mean(output, latents, ddpm), atol=1e-6, rtol=0
    )


# --- degenerate steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "sampler", "options", "stochastic"),
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
def test_degenerate_steps_are_outside_the_stochastic_ones(kind, sampler, options, stochastic):
    diffusion = build_diffusion(make_scheduler(kind, **options), sampler=sampler, num_inference_steps=10, eta=1.0)
    assert diffusion.stochastic_steps == stochastic
    assert (diffusion.coefficients.std[:stochastic] > 1e-3).all()
    assert diffusion.coefficients.std[stochastic:].tolist() == [0.0] * (10 - stochastic)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_sampler_without_a_stochastic_step_is_refused(spacing):
    # one step straight to alpha 1 has no noise and so no policy
    with pytest.raises(ValueError, match="num_inference_steps is 1: no step is stochastic before the end"):
        build_diffusion(make_scheduler(timestep_spacing=spacing), sampler="ddim", num_inference_steps=1, eta=1.0)


# numpy.arange(1000, 0, −1000/T) has an element too many for 62 of the T up to 1000, because of rounding
@pytest.mark.parametrize("num_inference_steps", [61, 103, 121])
def test_trailing_timesteps_are_as_many_as_asked_for_and_none_is_negative(num_inference_steps):
    scheduler = make_scheduler(timestep_spacing="trailing")
    try:
        diffusion = build_diffusion(scheduler, sampler="ddim", num_inference_steps=num_inference_steps, eta=1.0)
    except ValueError as error:
        # refusing it by name is as good
        assert "sample.num_inference_steps" in str(error)
        return
    # timestep −1 would read the alpha of the noisiest step for the cleanest
    assert int(diffusion.timesteps.min()) >= 0
    assert len(diffusion) == num_inference_steps
    assert diffusion.stochastic_steps == num_inference_steps - 1


# --- re-noising -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_renoising_is_that_of_diffusers_at_every_step(kind, spacing):
    scheduler = make_scheduler(kind, timestep_spacing=spacing)
    diffusion = build_diffusion(scheduler, sampler="ddim", num_inference_steps=7, eta=1.0)
    x0, noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3, 4, 4)
    for step, timestep in enumerate(diffusion.timesteps):
        expected = scheduler.add_noise(x0, noise, timestep[None])
        torch.testing.assert_close(diffusion.renoise(x0, step, noise), expected, atol=2e-6, rtol=1e-6)


def test_renoising_by_hand():
    # ā 0.16: 0.4·x0 + sqrt(0.84)·noise; ā 0.64: 0.8·x0 + 0.6·noise
    diffusion = build_diffusion(two_step_scheduler(), sampler="ddim", num_inference_steps=2, eta=1.0)
    x0, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    assert float(diffusion.renoise(x0, 0, noise)) == pytest.approx(0.8 - 0.9165151)
    assert float(diffusion.renoise(x0, 1, noise)) == pytest.approx(1.6 - 0.6)


def test_tables_are_float32_and_move_together():
    diffusion = build_diffusion(make_scheduler(), sampler="ddim", num_inference_steps=7, eta=1.0).to(
        torch.device("meta")
    )
    tensors = [diffusion.signal, diffusion.noise, diffusion.coefficients.std, diffusion.deterministic.mean_x0]
    assert all(tensor.dtype == torch.float32 and tensor.device.type == "meta" for tensor in tensors)
    assert diffusion.timesteps.dtype == torch.int64 and diffusion.timesteps.device.type == "meta"
    assert (diffusion.stochastic_steps, diffusion.coefficients.x0_clip) == (6, 1.0)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "arguments", "message"),
    [
        (
            "EulerDiscreteScheduler",
            {},
            {},
            r"scheduler is EulerDiscreteScheduler; only DDPMScheduler, DDIMScheduler, PNDM",
        ),
        ("DPMSolverMultistepScheduler", {}, {}, r"scheduler is DPMSolverMultistepScheduler; only DDPMScheduler"),
        (
            "DDIMScheduler",
            {"thresholding": True},
            {},
            r"thresholding: true .*use a model or scheduler_config\.json without",
        ),
        (
            "DDIMScheduler",
            {"prediction_type": "flow"},
            {},
            r"prediction_type is 'flow'; use epsilon, sample or v_prediction",
        ),
        ("DDIMScheduler", {}, {"sampler": "euler"}, r"sample\.scheduler is 'euler'; use ddim or ddpm"),
        ("DDIMScheduler", {}, {"eta": 0.0}, r"sample\.eta is 0\.0; .*use a value in \(0, 1\]"),
        ("DDIMScheduler", {}, {"eta": -0.5}, r"sample\.eta is -0\.5; .*use a value in \(0, 1\]"),
        ("DDIMScheduler", {}, {"eta": 1.5}, r"sample\.eta is 1\.5; .*use a value in \(0, 1\]"),
        ("DDIMScheduler", {}, {"eta": float("nan")}, r"sample\.eta is nan; .*use a value in \(0, 1\]"),
        (
            "DDPMScheduler",
            {},
            {"sampler": "ddpm", "eta": 0.5},
            r"sample\.eta is 0\.5 .*leave it at 1 or use scheduler=ddim",
        ),
        ("DDIMScheduler", {}, {"num_inference_steps": 0}, r"sample\.num_inference_steps is 0; use 1 to 1000"),
        ("DDIMScheduler", {}, {"num_inference_steps": -3}, r"sample\.num_inference_steps is -3; use 1 to 1000"),
        ("DDIMScheduler", {}, {"num_inference_steps": 1001}, r"sample\.num_inference_steps is 1001; use 1 to 1000"),
    ],
)
def test_what_the_affine_step_cannot_express_is_refused_by_name(kind, options, arguments, message):
    scheduler = make_scheduler(kind, **options)
    with pytest.raises(ValueError, match=message):
        build_diffusion(scheduler, **{"sampler": "ddim", "num_inference_steps": 10, "eta": 1.0, **arguments})


@pytest.mark.parametrize("variance", ["learned", "learned_range", "fixed_large_log"])
def test_variances_that_ancestral_sampling_cannot_fix_are_refused(variance):
    scheduler = make_scheduler("DDPMScheduler", variance_type=variance)
    with pytest.raises(
        ValueError, match=f"variance_type is '{variance}'; .*fixed_small, fixed_small_log or fixed_large"
    ):
        build_diffusion(scheduler, sampler="ddpm", num_inference_steps=10, eta=1.0)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_zero_terminal_snr_is_refused_with_epsilon_prediction(sampler):
    # x0 = (x − m)/0: nothing of the image is in x
    scheduler = make_scheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="rescale_betas_zero_snr.* epsilon prediction can't invert"):
        build_diffusion(scheduler, sampler=sampler, num_inference_steps=10, eta=1.0)


def test_timesteps_pushed_past_the_trained_ones_are_refused_by_name():
    # leading spacing of all 1000 steps plus steps_offset 1 ends at timestep 1000, which was never trained
    scheduler = make_scheduler(steps_offset=1)
    with pytest.raises(ValueError, match=r"steps_offset|num_inference_steps"):
        build_diffusion(scheduler, sampler="ddim", num_inference_steps=1000, eta=1.0)


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
