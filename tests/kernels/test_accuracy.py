"""Both backends against float64 autograd of the literal formula: log-prob, loss, statistics and every gradient."""

import itertools
import math

import pytest
import torch

from hrf_kernels import clipped_surrogate, gaussian_log_prob, reference
from tests.kernels.cases import (
    BF16,
    DTYPES,
    FEW_DTYPES,
    FEW_OPTIONS,
    FP16,
    ONE,
    OPTIONS,
    PREDICTIONS,
    TOLERANCE,
    TWO,
    Case,
    Inputs,
    assert_within_tolerance,
    both_backends,
    coef_with,
    differentiate,
    draw,
    errors,
    exact,
    gradient_errors,
    sweep,
    wide,
    worst,
)

both_plans = pytest.mark.parametrize("shape", [ONE, TWO], ids=["one program", "two stages"])


def check(inputs, backend, upstream=None):
    found = differentiate(clipped_surrogate, inputs, upstream, backend=backend)
    assert_within_tolerance(found, exact(inputs, upstream))
    return found


@both_backends
@both_plans
@pytest.mark.parametrize("option", sweep(OPTIONS, FEW_OPTIONS))
def test_every_option(backend, shape, option):
    check(draw(Case(shape, **OPTIONS[option])), backend)


@both_backends
@both_plans
@pytest.mark.parametrize("clamp", [None, 0.75])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction(backend, shape, prediction, clamp):
    check(draw(Case(shape, prediction=prediction, clamp=clamp), seed=1), backend)


@both_backends
@both_plans
@pytest.mark.parametrize("output, latents", sweep(DTYPES, FEW_DTYPES, pairs=True), ids=str)
def test_every_dtype(backend, shape, output, latents):
    inputs = draw(Case(shape, output=output, latents=latents, **OPTIONS["all"]), seed=2)
    _, gradients = check(inputs, backend)
    assert [gradient.dtype for gradient in gradients] == [output, output]


@both_backends
@both_plans
def test_every_tensor_may_have_its_own_dtype(backend, shape):
    inputs = draw(Case(shape, guidance=3.0, kl_weight=0.3), seed=3)
    outputs, rest = inputs
    outputs["model_output"], outputs["unconditional_output"] = (
        outputs["model_output"].to(BF16),
        outputs["unconditional_output"].to(FP16),
    )
    rest["next_latents"], rest["reference_output"] = rest["next_latents"].to(BF16), rest["reference_output"].to(FP16)
    check(inputs, backend)


# B from 1 to 8; one element; odd; the largest of one program; just above it; aligned; a flat sample
SHAPES = [
    (1, 1, 1, 1), (1, 1, 1, 2), (2, 1, 1, 3), (3, 1, 5, 7), (8, 3, 8, 8), (4, 1, 28, 28), (7, 3, 13, 13),
    (5, 3, 32, 32), (2, 2, 64, 64), (1, 8193), (2, 3, 64, 64), (3, 3, 53, 53), (4, 1, 128, 128),
]  # fmt: skip


@both_backends
@pytest.mark.parametrize("shape", sweep(SHAPES, [(1, 1, 1, 1), (7, 3, 13, 13), (2, 2, 64, 64), (1, 8193)]), ids=str)
def test_every_size(backend, shape):
    check(draw(Case(shape, clamp=0.75, guidance=2.0), seed=4), backend)


@both_backends
def test_more_samples_than_one_finalize_program_takes(backend):
    # 16 rows to a program
    check(draw(Case((18, 1, 91, 91)), seed=5), backend)


@both_backends
@pytest.mark.parametrize("side", [256, 300])
def test_large_images(backend, side):
    # 24 chunks, and 33: more than the 32 columns that the finalize sums at a time
    check(draw(Case((1, 3, side, side), clamp=0.75), seed=6), backend)


@both_backends
@both_plans
def test_losses_may_be_weighted_after_the_call(backend, shape):
    # the gradient is written in the forward pass where a sample is small: it must be scaled then
    inputs = draw(Case(shape, kl_weight=0.3), seed=7)
    check(inputs, backend, upstream=torch.tensor([1.0, 0.5, -2.0, 0.0, 3.0, 1.0]))


@both_backends
@both_plans
def test_a_loss_scale_reaches_the_gradient_of_an_fp16_output(backend, shape):
    # by a factor of 2^-20 the gradient is below fp16's smallest number, and only the scale of 2^20 brings it back
    inputs = draw(Case(shape, output=FP16, guidance=3.0, loss_weight=2.0**-20), seed=13)
    _, gradients = check(inputs, backend, upstream=torch.full((6,), 2.0**20))
    assert all(gradient[0].any() for gradient in gradients)


@both_backends
@both_plans
@pytest.mark.parametrize("option", sweep(["plain", "clamp", "guidance", "coefficients per sample"], FEW_OPTIONS))
def test_the_gradient_of_the_log_prob_itself(backend, shape, option):
    case = Case(shape, **OPTIONS[option])
    outputs, rest = draw(case, seed=8)
    names = ("latents", "next_latents", "coef", "guidance_scale")
    rest = {name: rest[name] for name in names if name in rest}
    upstream = torch.linspace(-1, 2, len(rest["latents"]))

    def run(function, outputs, rest, **options):
        outputs = {name: tensor.clone().requires_grad_() for name, tensor in outputs.items()}
        log_prob = function(**outputs, **rest, **options)
        return log_prob.detach(), torch.autograd.grad((log_prob * upstream).sum(), list(outputs.values()))

    ours, gradients = run(gaussian_log_prob, outputs, rest, backend=backend)
    truth, expected = run(reference.gaussian_log_prob, wide(outputs), wide(rest))
    assert worst((ours.double() - truth) / (1 + truth.abs())) <= TOLERANCE["log_prob"]
    for gradient, correct in zip(gradients, expected, strict=True):
        for name, error in gradient_errors(gradient, correct):
            assert error <= TOLERANCE[name]


@both_backends
@both_plans
@pytest.mark.parametrize("std", [5e-2, 1e-2, 1e-3, 1e-4])
def test_small_std_costs_digits_of_the_gradient_only(backend, shape, std):
    # a mean near 1 is rounded to 2^-24, and next - mean is about std: 1e-7 / std of the gradient, and of the log-prob
    # what is left of that after averaging
    outputs, rest = draw(Case(shape, prediction="v"), seed=9)
    scale = std / float(rest["coef"].std)
    mean = reference.gaussian_mean(**wide(outputs), **{n: wide(rest)[n] for n in ("latents", "coef")})
    rest["next_latents"] = (mean + scale * (rest["next_latents"] - mean)).float()
    rest["coef"] = coef_with(rest["coef"], std=torch.tensor(std))
    log_prob = reference.gaussian_log_prob(
        **wide(outputs), **wide({n: rest[n] for n in ("latents", "next_latents", "coef")})
    )
    rest["old_log_prob"] = (log_prob - 0.05).float()
    inputs = Inputs(outputs, rest)
    limits = {"log_prob": max(5e-7, 2e-9 / std), "gradient": 2e-7 / std}
    found = list(errors(differentiate(clipped_surrogate, inputs, backend=backend), exact(inputs)))
    for name, error in found:
        assert error <= limits.get(name, math.inf), (name, error)


# --- the clip ---------------------------------------------------------------------------------------------------------


@both_backends
@both_plans
def test_the_ratios_and_clip_ranges_of_training(backend, shape):
    # log-ratios of 1e-5 to 1e-3 around a clip of 1e-4: k3 = x²/2 is below one ulp of the ratio, and must not be lost
    outputs, rest = draw(Case(shape), seed=10)
    with torch.no_grad():
        log_prob = clipped_surrogate(**outputs, **rest, backend=backend).log_prob
    rest["old_log_prob"] = log_prob - torch.tensor([1e-5, 3e-4, -3e-4, -1e-5, 1e-3, -1e-3])
    rest["clip_range"] = 1e-4
    result, gradients = differentiate(clipped_surrogate, Inputs(outputs, rest), backend=backend)
    assert result.outside.tolist() == [False, True, True, False, True, True]
    assert result.clipped.tolist() == [False, True, False, False, False, True]
    x = log_prob.double() - rest["old_log_prob"].double()
    # eager's is a difference of two numbers near x, each rounded
    assert ((result.approx_kl.double() - (x.expm1() - x)).abs() <= 2.0**-23 * x.abs()).all()
    # one rounding of the ratio, half an ulp of 1
    torch.testing.assert_close(result.ratio.double(), x.exp(), rtol=2.0**-23, atol=0)
    assert [bool(sample.any()) for sample in gradients[0]] == [True, False, True, True, True, False]


@both_backends
@both_plans
def test_a_ratio_on_the_bound_is_not_clipped(backend, shape):
    # on-policy, 1 ± 0: max() of two equal terms keeps the whole gradient
    outputs, rest = draw(Case(shape), seed=11)
    with torch.no_grad():
        rest["old_log_prob"] = clipped_surrogate(**outputs, **rest, backend=backend).log_prob
    wide_clip, gradients = differentiate(clipped_surrogate, Inputs(outputs, rest), backend=backend)
    result, narrow = differentiate(clipped_surrogate, Inputs(outputs, rest | {"clip_range": 0.0}), backend=backend)
    assert not result.outside.any() and not result.clipped.any()
    assert torch.equal(result.loss, wide_clip.loss) and torch.equal(narrow[0], gradients[0]) and narrow[0].any()


@both_backends
@both_plans
def test_an_advantage_of_zero_has_no_loss_and_no_gradient(backend, shape):
    outputs, rest = draw(Case(shape), seed=12)
    rest["advantages"] = torch.zeros(len(rest["latents"]))
    result, gradients = differentiate(clipped_surrogate, Inputs(outputs, rest), backend=backend)
    assert not result.loss.any() and not result.clipped.any() and not gradients[0].any()


@pytest.mark.slow
@both_backends
@both_plans
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("output, latents", DTYPES, ids=str)
def test_every_option_of_every_prediction_in_every_dtype(backend, shape, prediction, output, latents):
    for seed, (clamp, guidance, kl_weight, per_sample) in enumerate(
        itertools.product((None, 0.75), (None, 3.0), (None, 0.3), (False, True))
    ):
        options = {"clamp": clamp, "guidance": guidance, "kl_weight": kl_weight, "per_sample": per_sample}
        check(draw(Case(shape, prediction=prediction, output=output, latents=latents, **options), seed=seed), backend)
