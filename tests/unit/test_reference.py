"""The policy's mathematics by hand: log-prob, its gradient, the clipped surrogate, one step, and Philox noise."""

import math
import re

import pytest
import torch

import hrf_kernels.philox as philox_module
from hrf_kernels import StepCoefficients
from hrf_kernels.philox import philox, philox_normal
from hrf_kernels.reference import clipped_surrogate, gaussian_log_prob, gaussian_mean, gaussian_step

HALF_LOG_2PI = 0.9189385332046727


NAMES = ("x0_latents", "x0_output", "mean_x0", "mean_latents", "mean_output", "std")


def coefficients(*values, clip=None, dtype=torch.float32, **changes):
    """One step: the six numbers in the order of NAMES, or the example of the hand arithmetic with changes."""
    example = dict(zip(NAMES, values or (2.0, -1.0, 0.5, 0.25, 0.1, 0.5), strict=True)) | changes
    return StepCoefficients(**{k: torch.tensor(v, dtype=dtype) for k, v in example.items()}, x0_clip=clip)


def table_of(steps):
    """[B] coefficients, one step per sample."""
    columns = {name: torch.stack([getattr(step, name) for step in steps]) for name in NAMES}
    return StepCoefficients(**columns, x0_clip=steps[0].x0_clip)


def row(*values, dtype=torch.float32):
    """One sample of one row of pixels, [1, 1, 1, N]."""
    return torch.tensor(values, dtype=dtype).reshape(1, 1, 1, -1)


def random_batch(*shape, dtype=torch.float32, seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


# --- log-prob ---------------------------------------------------------------------------------------------------------


def test_mean_by_hand():
    # x0 = 2·[1, 2] − [0.5, −1] = [1.5, 5]; mean = x0/2 + x/4 + m/10 = [0.75 + 0.25 + 0.05, 2.5 + 0.5 − 0.1]
    mean = gaussian_mean(row(0.5, -1), row(1, 2), coefficients())
    torch.testing.assert_close(mean, row(1.05, 2.9))


def test_mean_with_a_clamped_x0_by_hand():
    # x0 = [1.5, 5] clamped to ±2 is [1.5, 2]; mean = [1.05, 1 + 0.5 − 0.1]; mirrored inputs are clamped at −2
    mean = gaussian_mean(row(0.5, -1), row(1, 2), coefficients(clip=2.0))
    torch.testing.assert_close(mean, row(1.05, 1.4))
    torch.testing.assert_close(gaussian_mean(row(-0.5, 1), row(-1, -2), coefficients(clip=2.0)), row(-1.05, -1.4))


def test_log_prob_by_hand():
    # mean [1.05, 2.9], std 0.5, next [1.55, 1.9]: z = [1, −2]; −(1 + 4)/2/2 − log 0.5 − log(2π)/2
    log_prob = gaussian_log_prob(row(0.5, -1), row(1, 2), row(1.55, 1.9), coefficients())
    torch.testing.assert_close(log_prob, torch.tensor([-1.25 + 0.6931472 - HALF_LOG_2PI]))


def test_log_prob_with_a_clamped_x0_by_hand():
    # mean [1.05, 1.4], next [1.55, 1.9]: z = [1, 1]; −1/2 − log 0.5 − log(2π)/2
    log_prob = gaussian_log_prob(row(0.5, -1), row(1, 2), row(1.55, 1.9), coefficients(clip=2.0))
    torch.testing.assert_close(log_prob, torch.tensor([-0.5 + 0.6931472 - HALF_LOG_2PI]))


def test_log_prob_is_a_mean_over_pixels_and_separate_per_sample():
    # mean = m = 0 and std = 1, so z = next: sample 0 has z² = 1 everywhere, sample 1 has z² = 4 in half of its pixels
    coef = coefficients(0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
    following = torch.ones(2, 3, 2, 2)
    following[1, :, 0], following[1, :, 1] = 2, 0
    zeros = torch.zeros(2, 3, 2, 2)
    log_prob = gaussian_log_prob(zeros, zeros, following, coef)
    torch.testing.assert_close(log_prob, torch.tensor([-0.5, -1.0]) - HALF_LOG_2PI)


@pytest.mark.parametrize("clip", [None, 1.0, 0.3])
def test_log_prob_is_that_of_torch_distributions_in_float64(clip):
    output, latents, following = random_batch(3, 2, 5, 7, dtype=torch.float64)
    x0 = 1.25 * latents - 0.75 * output
    bound = torch.full_like(x0, torch.inf if clip is None else clip)
    x0 = torch.minimum(torch.maximum(x0, -bound), bound)
    normal = torch.distributions.Normal(0.875 * x0 + 0.125 * latents + 0.3125 * output, 0.40625)
    expected = normal.log_prob(following).mean(dim=(1, 2, 3))
    coef = coefficients(1.25, -0.75, 0.875, 0.125, 0.3125, 0.40625, clip=clip, dtype=torch.float64)
    ours = gaussian_log_prob(output, latents, following, coef)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


# --- its gradient -----------------------------------------------------------------------------------------------------


def gradient_of_log_prob(output, latents, following, coef):
    output = output.clone().requires_grad_()
    return torch.autograd.grad(gaussian_log_prob(output, latents, following, coef).sum(), output)[0]


def test_gradient_by_hand():
    # z/(N·std)·(mean_output + mean_x0·x0_output) = [1, −2]/(2·0.5)·(0.1 − 0.5)
    gradient = gradient_of_log_prob(row(0.5, -1), row(1, 2), row(1.55, 1.9), coefficients())
    torch.testing.assert_close(gradient, row(-0.4, 0.8))


def test_the_clamp_stops_the_gradient_through_x0_and_leaves_the_direct_one():
    # z = [1, 1]; pixel 0 is inside (−0.4), pixel 1 is clamped and keeps mean_output = 0.1 only
    gradient = gradient_of_log_prob(row(0.5, -1), row(1, 2), row(1.55, 1.9), coefficients(clip=2.0))
    torch.testing.assert_close(gradient, row(-0.4, 0.1))


def test_a_clamped_pixel_has_no_gradient_when_the_mean_is_all_x0():
    # x0 = [1.5, 5, −5] with clip 2 and mean_output 0: only the first pixel is trained
    coef = coefficients(mean_output=0.0, clip=2.0)
    gradient = gradient_of_log_prob(row(0.5, -1, 1), row(1, 2, -2), row(0, 0, 0), coef)
    assert gradient[0, 0, 0, 0] != 0
    assert gradient[0, 0, 0, 1:].tolist() == [0, 0]


def test_a_pixel_exactly_on_the_clamp_keeps_its_gradient():
    # x0 = 2·1 − 0 = 2 = clip: lo <= x0 <= hi holds, so (next − mean)/(N·std²)·(0.1 − 0.5) with mean 1.25, next 1.5
    gradient = gradient_of_log_prob(row(0), row(1), row(1.5), coefficients(clip=2.0))
    torch.testing.assert_close(gradient, row(0.25 / 0.25 * -0.4))


@pytest.mark.parametrize("clip", [None, 1.0, 0.3])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (5, 1, 3, 1)])
def test_autograd_in_float64_is_the_analytic_gradient(clip, shape):
    output, latents, following = random_batch(*shape, dtype=torch.float64, seed=1)
    coef = coefficients(1.3, -0.8, 0.9, 0.05, 0.35, 0.07, clip=clip, dtype=torch.float64)
    x0 = 1.3 * latents - 0.8 * output
    inside = torch.ones_like(x0) if clip is None else ((x0 >= -clip) & (x0 <= clip)).double()
    clamped = x0 if clip is None else x0.clip(-clip, clip)
    z = (following - 0.9 * clamped - 0.05 * latents - 0.35 * output) / 0.07
    analytic = z / (math.prod(shape[1:]) * 0.07) * (0.35 + 0.9 * -0.8 * inside)
    ours = gradient_of_log_prob(output, latents, following, coef)
    torch.testing.assert_close(ours, analytic, atol=1e-11, rtol=1e-11)
    # both branches of the clamp are in the data
    assert clip is None or 0 < inside.mean() < 1


# --- dtypes and shapes ------------------------------------------------------------------------------------------------


def test_half_precision_inputs_are_accumulated_in_float32():
    # 0.5·mean z² over 3·32·32 pixels: equal to the bit to the float32 result on the same (already rounded) numbers
    output, latents, following = random_batch(2, 3, 32, 32, dtype=torch.bfloat16)
    coef = coefficients(clip=1.0)
    ours = gaussian_log_prob(output, latents, following, coef)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, gaussian_log_prob(output.float(), latents.float(), following.float(), coef))
    assert gaussian_mean(output, latents, coef).dtype == torch.float32


def test_one_input_in_half_precision_does_not_lower_the_others():
    # next = 1 + 2^-10 is not a bfloat16; with m = x = 0 and std = 2^-10, z = (1 + 2^-10)/2^-10 = 1025
    coef = coefficients(0.0, 0.0, 0.0, 0.0, 1.0, 2.0**-10)
    zero = row(0, dtype=torch.bfloat16)
    log_prob = gaussian_log_prob(zero, zero, row(1 + 2.0**-10), coef)
    torch.testing.assert_close(log_prob, torch.tensor([-(1025.0**2) / 2 + 10 * math.log(2) - HALF_LOG_2PI]))


def test_the_gradient_of_a_half_precision_output_is_in_its_dtype():
    output, latents, following = random_batch(2, 3, 4, 4, dtype=torch.bfloat16)
    gradient = gradient_of_log_prob(output, latents, following, coefficients())
    exact = gradient_of_log_prob(output.float(), latents.float(), following.float(), coefficients())
    assert gradient.dtype == torch.bfloat16
    assert torch.equal(gradient, exact.bfloat16())


def test_coefficients_per_sample_equal_scalar_ones():
    output, latents, following = random_batch(3, 2, 4, 4)
    values = ((2.0, -1.0, 0.5, 0.25, 0.1, 0.5), (1.5, -0.5, 0.75, 0.5, 0.0, 0.25), (1.0, 0.0, 1.0, 0.0, 1.0, 2.0))
    steps = [coefficients(*step, clip=1.0) for step in values]
    table = table_of(steps)
    together = gaussian_log_prob(output, latents, following, table)
    for i, step in enumerate(steps):
        one = slice(i, i + 1)
        alone = gaussian_log_prob(output[one], latents[one], following[one], step)
        # to the last bit or two: torch's log has a vector and a scalar implementation
        torch.testing.assert_close(together[one], alone, atol=0, rtol=1e-6)
        assert torch.equal(gaussian_mean(output, latents, table)[one], gaussian_mean(output[one], latents[one], step))


@pytest.mark.parametrize("function", [gaussian_mean, gaussian_log_prob, gaussian_step])
def test_a_model_output_of_another_shape_is_refused(function):
    # twice the channels: a model that also predicts its variance
    output, latents = torch.zeros(2, 6, 4, 4), torch.zeros(2, 3, 4, 4)
    arguments = {gaussian_log_prob: (latents,)}.get(function, ())
    options = {gaussian_step: {"seed": 0, "sample_id": torch.arange(2), "step": 0}}.get(function, {})
    with pytest.raises(ValueError, match=r"model_output is \(2, 6, 4, 4\) but latents are \(2, 3, 4, 4\)"):
        function(output, latents, *arguments, coefficients(), **options)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 1, 4, 4), (2, 3, 4, 1)])
def test_next_latents_that_would_broadcast_are_refused(shape):
    latents = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=re.escape(f"next_latents is {shape} but latents are (2, 3, 4, 4)")):
        gaussian_log_prob(latents, latents, torch.zeros(shape), coefficients())


def test_a_sample_id_that_is_not_one_per_sample_is_refused():
    # one id for two samples would broadcast: both would silently get the same noise
    latents = torch.zeros(2, 3, 4, 4)
    with pytest.raises((ValueError, RuntimeError)):
        gaussian_step(latents, latents, coefficients(), seed=0, sample_id=torch.arange(1), step=0)


@pytest.mark.parametrize("name", ["old_log_prob", "advantages"])
def test_columns_in_place_of_one_number_per_sample_are_refused(name):
    # [B, 1] against [B] would broadcast to a [B, B] loss of every sample with every other's advantage
    latents = torch.zeros(3, 1, 2, 2)
    given = {"old_log_prob": torch.zeros(3), "advantages": torch.ones(3)} | {name: torch.ones(3, 1)}
    with pytest.raises((ValueError, RuntimeError)):
        clipped_surrogate(latents, latents, latents, coefficients(), **given, clip_range=0.2)


def test_a_table_of_coefficients_gives_steps_and_slices():
    numbers = torch.arange(18.0).reshape(6, 3)
    table = StepCoefficients(*numbers, x0_clip=0.7)
    assert len(table) == 3
    assert table[1].std.shape == () and [float(v) for v in (table[1].x0_latents, table[1].std)] == [1, 16]
    assert table[1:].mean_x0.tolist() == [7, 8]
    assert table[torch.tensor([2, 0, 2])].x0_output.tolist() == [5, 3, 5]
    assert table.to("cpu").mean_output.tolist() == [12, 13, 14]
    for derived in (table[1], table[1:], table.to("cpu")):
        assert derived.x0_clip == 0.7


# --- the clipped surrogate --------------------------------------------------------------------------------------------

# mean = m = [0, 0], std 1, next [1, 1]: log_prob = −1/2 − log(2π)/2 and d log_prob/dm = z/(N·std) = [1/2, 1/2]
PLAIN = (0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
LOG_PROB = -0.5 - HALF_LOG_2PI


def surrogate_at(ratios, advantages, clip_range):
    """Surrogate at chosen ratios and the gradient of its summed loss, per sample at the first of two pixels."""
    ratios = torch.tensor(ratios, dtype=torch.float64)
    output = torch.zeros(len(ratios), 1, 1, 2, requires_grad=True)
    zeros, ones = torch.zeros(len(ratios), 1, 1, 2), torch.ones(len(ratios), 1, 1, 2)
    old = (LOG_PROB - ratios.log()).float()
    coef = coefficients(*PLAIN)
    result = clipped_surrogate(output, zeros, ones, coef, old, torch.tensor(advantages), clip_range)
    gradient = torch.autograd.grad(result.loss.sum(), output)[0]
    assert torch.equal(gradient[..., 0], gradient[..., 1])
    return result, gradient[:, 0, 0, 0]


# clip 0.2, |A| 2: loss = max(−A·r, −A·clip(r, 0.8, 1.2)); gradient −A·r/2 where the first is the larger or equal one
REGIONS = {
    # name: (A, ratio, loss, gradient, outside, clipped)
    "A > 0, ratio below": (2.0, 0.5, -1.0, -0.5, True, False),  # max(−1, −1.6)
    "A > 0, ratio inside": (2.0, 1.1, -2.2, -1.1, False, False),  # both −2.2
    "A > 0, ratio above": (2.0, 1.5, -2.4, 0.0, True, True),  # max(−3, −2.4)
    "A < 0, ratio below": (-2.0, 0.5, 1.6, 0.0, True, True),  # max(1, 1.6)
    "A < 0, ratio inside": (-2.0, 1.1, 2.2, 1.1, False, False),  # both 2.2
    "A < 0, ratio above": (-2.0, 1.5, 3.0, 1.5, True, False),  # max(3, 2.4)
    "A = 0, ratio above": (0.0, 1.5, 0.0, 0.0, True, False),
}


@pytest.mark.parametrize("region", REGIONS)
def test_surrogate_in_every_region_by_hand(region):
    advantage, ratio, loss, gradient, outside, clipped = REGIONS[region]
    result, found = surrogate_at([ratio], [advantage], 0.2)
    torch.testing.assert_close(result.loss.detach(), torch.tensor([loss]))
    torch.testing.assert_close(found, torch.tensor([gradient]))
    torch.testing.assert_close(result.ratio, torch.tensor([ratio]))
    torch.testing.assert_close(result.log_prob, torch.tensor([LOG_PROB]))
    assert (result.outside.tolist(), result.clipped.tolist()) == ([outside], [clipped])
    # "clipped" says exactly that there is no gradient (an advantage of 0 never had one)
    assert result.clipped.item() == (found.item() == 0 and advantage != 0)


def test_surrogate_of_a_batch_is_that_of_its_samples():
    rows = list(REGIONS.values())
    result, gradient = surrogate_at([r[1] for r in rows], [r[0] for r in rows], 0.2)
    torch.testing.assert_close(result.loss.detach(), torch.tensor([r[2] for r in rows]))
    torch.testing.assert_close(gradient, torch.tensor([r[3] for r in rows]))
    assert result.outside.tolist() == [r[4] for r in rows]
    assert result.clipped.tolist() == [r[5] for r in rows]


def test_approx_kl_by_hand():
    # k3 = (r − 1) − log r: 0.5 → −0.5 + 0.693147, 1 → 0, 1.5 → 0.5 − 0.405465
    result, _ = surrogate_at([0.5, 1.0, 1.5], [1.0, 1.0, 1.0], 0.2)
    torch.testing.assert_close(result.approx_kl, torch.tensor([0.1931472, 0.0, 0.0945349]), atol=5e-7, rtol=0)


def test_approx_kl_keeps_its_digits_at_the_ratios_of_training():
    # log-ratios near the clip range of 1e-4: k3 = x²/2 ≈ 5e-9, below one ulp of the ratio itself
    zeros = torch.zeros(1000, 1, 1, 1)
    coef = coefficients(*PLAIN)
    log_prob = gaussian_log_prob(zeros, zeros, zeros, coef)
    old = log_prob + torch.linspace(-3e-4, 3e-4, 1000)
    result = clipped_surrogate(zeros, zeros, zeros, coef, old, torch.ones(1000), 1e-4)
    exact = (log_prob - old).double()
    torch.testing.assert_close(result.approx_kl.double(), exact.square() / 2, atol=5e-11, rtol=1e-2)
    assert float(result.approx_kl.min()) >= 0


def test_only_the_loss_has_a_gradient():
    output = torch.zeros(2, 1, 2, 2, requires_grad=True)
    zeros = torch.zeros(2, 1, 2, 2)
    result = clipped_surrogate(output, zeros, zeros, coefficients(), torch.zeros(2), torch.ones(2), 0.2)
    assert result.loss.requires_grad
    assert not any(value.requires_grad for name, value in result._asdict().items() if name != "loss")
    assert all(value.shape == (2,) for value in result)
    assert result.outside.dtype == result.clipped.dtype == torch.bool


def test_clip_ranges_per_sample_equal_scalar_ones():
    ratios, advantages = [0.85, 1.15, 1.15, 0.85], [1.0, 1.0, -1.0, -1.0]
    # 1.15 with A = 1 is clipped at 0.1 and not at 0.3
    narrow, narrow_gradient = surrogate_at(ratios, advantages, 0.1)
    wide, wide_gradient = surrogate_at(ratios, advantages, 0.3)
    mixed, gradient = surrogate_at(ratios, advantages, torch.tensor([0.1, 0.3, 0.1, 0.3]))
    pick = torch.tensor([True, False, True, False])
    assert torch.equal(mixed.loss, torch.where(pick, narrow.loss, wide.loss))
    assert torch.equal(gradient, torch.where(pick, narrow_gradient, wide_gradient))
    assert torch.equal(mixed.outside, torch.where(pick, narrow.outside, wide.outside))
    assert narrow.clipped.tolist() == [False, True, False, True] and not wide.clipped.any()


def test_a_ratio_of_exactly_one_has_the_full_gradient():
    # max() of two equal terms must not lose a part: the first update on fresh samples is plain policy gradient
    _, gradient = surrogate_at([1.0], [3.0], 1e-4)
    torch.testing.assert_close(gradient, torch.tensor([-1.5]), atol=1e-6, rtol=1e-6)


def test_the_gradient_in_float64_is_minus_advantage_times_ratio_times_that_of_the_log_prob():
    output, latents, following = random_batch(6, 2, 3, 3, dtype=torch.float64, seed=4)
    coef = coefficients(1.3, -0.8, 0.9, 0.05, 0.35, 0.6, clip=1.0, dtype=torch.float64)
    log_prob = gaussian_log_prob(output, latents, following, coef)
    ratios = torch.tensor([0.7, 0.95, 1.3, 0.7, 0.95, 1.3], dtype=torch.float64)
    advantages = torch.tensor([1.5, 1.5, 1.5, -0.5, -0.5, -0.5], dtype=torch.float64)
    variable = output.clone().requires_grad_()
    result = clipped_surrogate(variable, latents, following, coef, log_prob - ratios.log(), advantages, 0.1)
    gradient = torch.autograd.grad(result.loss.mean(), variable)[0]
    # inactive: (A > 0 and ratio > 1.1) is sample 2, (A < 0 and ratio < 0.9) is sample 3; mean over B = 6
    active = torch.tensor([1, 1, 0, 0, 1, 1], dtype=torch.float64)
    weight = -advantages * ratios * active / 6
    expected = weight[:, None, None, None] * gradient_of_log_prob(output, latents, following, coef)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-10)


# --- one step ---------------------------------------------------------------------------------------------------------


def test_noise_of_a_shape_that_is_no_multiple_of_four_is_contiguous():
    # the kernels ask for it of every latent, and two-dimensional points have shape (2,)
    assert philox_normal((2,), seed=1, sample_id=torch.arange(3), step=0).is_contiguous()


def test_a_step_is_the_mean_plus_std_times_philox_noise():
    output, latents, _ = random_batch(2, 3, 4, 4)
    coef, ids = coefficients(clip=1.0), torch.tensor([7, 3])
    following, _ = gaussian_step(output, latents, coef, seed=11, sample_id=ids, step=5)
    noise = philox_normal((3, 4, 4), seed=11, sample_id=ids, step=5)
    # 0.5·noise is exact, so only the sum with the mean is rounded
    torch.testing.assert_close(following - gaussian_mean(output, latents, coef), 0.5 * noise, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_replayed_step_has_a_ratio_of_exactly_one(dtype, per_sample):
    output, latents, _ = random_batch(4, 3, 16, 16, seed=2)
    coef = coefficients(std=0.01, clip=1.0)
    if per_sample:
        coef = table_of([coef] * 4)
    output = output.to(dtype)
    following, old = gaussian_step(output, latents, coef, seed=1, sample_id=torch.arange(4), step=0)
    assert torch.equal(gaussian_log_prob(output, latents, following, coef), old)
    result = clipped_surrogate(output, latents, following, coef, old, torch.ones(4), 1e-4)
    assert torch.equal(result.ratio, torch.ones(4))
    assert not result.outside.any() and torch.equal(result.approx_kl, torch.zeros(4))


def test_a_step_with_std_zero_gives_the_mean():
    output, latents, _ = random_batch(2, 3, 4, 4)
    coef = coefficients(std=0.0)
    following, log_prob = gaussian_step(output, latents, coef, seed=1, sample_id=torch.arange(2), step=0)
    assert torch.equal(following, gaussian_mean(output, latents, coef))
    assert not log_prob.isfinite().any()


def test_a_step_does_not_depend_on_how_the_batch_is_split():
    output, latents, _ = random_batch(5, 3, 4, 4)
    ids = torch.tensor([4, 0, 9, 2, 7])
    whole, whole_log_prob = gaussian_step(output, latents, coefficients(), seed=3, sample_id=ids, step=2)
    for part in (slice(0, 2), slice(2, 5), slice(3, 4)):
        one, log_prob = gaussian_step(output[part], latents[part], coefficients(), seed=3, sample_id=ids[part], step=2)
        assert torch.equal(one, whole[part])
        assert torch.equal(log_prob, whole_log_prob[part])


# --- Philox -----------------------------------------------------------------------------------------------------------

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, answer
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, answer):
    low, high = words(key)
    found = philox(tuple(torch.tensor([word]) for word in words(counter)), low | high << 32)
    assert [int(word) for word in found] == words(answer)


def python_philox(counter, key):
    """Salmon et al., SC 2011, in Python integers: ten rounds, the key bumped between them."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second % 2**32, first >> 32 ^ c[3] ^ k[1], first % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(("seed", "sample", "step"), [(0, 0, 0), (2**63 + 12345, 2**32 - 1, 39), (2**32, 6, 2**32 - 1)])
def test_noise_is_box_muller_of_the_counters_element_step_sample(seed, sample, step):
    # element i from word i % 4 of counter (i // 4, step, sample, 0), key (low, high) words of the seed
    expected = []
    for quad in range(3):
        u = [(word >> 8) / 2**24 for word in python_philox((quad, step, sample, 0), (seed % 2**32, seed >> 32))]
        for radius, angle in ((u[0], u[1]), (u[2], u[3])):
            length = math.sqrt(-2 * math.log(1 - radius))
            expected += [length * math.cos(2 * math.pi * angle), length * math.sin(2 * math.pi * angle)]
    noise = philox_normal((3, 2, 2), seed=seed, sample_id=torch.tensor([sample]), step=step)
    assert noise.dtype == torch.float32 and noise.shape == (1, 3, 2, 2)
    # float32 angles up to 2π: a few 1e-7 of a radius of at most 5.8
    torch.testing.assert_close(noise.flatten().double(), torch.tensor(expected).double(), atol=5e-6, rtol=0)


def test_noise_has_the_moments_of_a_standard_normal():
    n = 6 * 3 * 64 * 64
    x = philox_normal((3, 64, 64), seed=9, sample_id=torch.arange(6), step=1).double()
    # four standard errors each: 1/sqrt(n), sqrt(2/n), sqrt(15/n), sqrt(96/n), sqrt(p(1−p)/n)
    assert abs(float(x.mean())) < 4 * math.sqrt(1 / n)
    assert abs(float(x.square().mean()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float(x.pow(3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float(x.pow(4).mean()) - 3) < 4 * math.sqrt(96 / n)
    for bound, p in ((1, 0.3173105), (2, 0.0455003), (3, 0.0026998)):
        assert abs(float((x.abs() > bound).double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / n)


OTHERS = (
    {"seed": 1},
    {"seed": 2**32},
    {"seed": 2**63},
    {"sample": 1},
    {"sample": 2**31},
    {"step": 1},
    {"step": 2**32 - 1},
)


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_noise_is_independent_across_seed_sample_and_step(other):
    def draw(seed=0, sample=0, step=0):
        return philox_normal((3, 32, 32), seed=seed, sample_id=torch.tensor([sample]), step=step).flatten().double()

    a, b = draw(), draw(**other)
    n = len(a)
    # a product of independent normals has variance 1, of their squares less 1 variance 4: four standard errors
    assert abs(float((a * b).mean())) < 4 / math.sqrt(n)
    assert abs(float(((a.square() - 1) * (b.square() - 1)).mean())) < 8 / math.sqrt(n)


def test_noise_is_independent_between_the_elements_of_a_sample():
    x = philox_normal((4, 32, 32), seed=5, sample_id=torch.arange(4), step=0).flatten(1).double()
    for lag in (1, 2, 3, 4, 32):
        a, b = x[:, :-lag], x[:, lag:]
        assert abs(float((a * b).mean())) < 4 / math.sqrt(a.numel())
        assert abs(float(((a.square() - 1) * (b.square() - 1)).mean())) < 8 / math.sqrt(a.numel())


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 9])
def test_a_count_that_is_no_multiple_of_four_is_the_beginning_of_a_longer_one(count):
    ids = torch.tensor([2, 5])
    longer = philox_normal((12,), seed=4, sample_id=ids, step=3)
    assert torch.equal(philox_normal((count,), seed=4, sample_id=ids, step=3), longer[:, :count])


def test_noise_does_not_touch_torchs_generator():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    philox_normal((3, 4, 4), seed=4, sample_id=torch.arange(2), step=3)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_the_most_extreme_words_give_finite_noise(monkeypatch, word):
    # u = 1 − 2^-24 is the largest: radius sqrt(−2·log 2^-24) = 5.77; u = 0 gives radius 0
    monkeypatch.setattr(philox_module, "philox", lambda counter, key: tuple(torch.full_like(c, word) for c in counter))
    noise = philox_normal((4,), seed=0, sample_id=torch.arange(1), step=0)
    assert noise.isfinite().all()
    radius = noise[0, :2].norm()
    torch.testing.assert_close(radius, torch.tensor(math.sqrt(48 * math.log(2)) if word else 0.0))
