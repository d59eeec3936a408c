"""NaN, infinities, a std that is none and ratios that overflow: seen in the loss or bounded, never hidden."""

import math

import pytest
import torch

from hrf_kernels import clipped_surrogate, gaussian_step, ops
from hrf_kernels.coefficients import StepInputs
from hrf_kernels.reference import LOG_RATIO_LIMIT
from tests.kernels.cases import Case, Inputs, both_backends, coef_with, differentiate, draw, exact, worst

both_plans = pytest.mark.parametrize("shape", [(6, 1, 5, 7), (6, 1, 91, 91)], ids=["one program", "two stages"])


@both_backends
@both_plans
@pytest.mark.parametrize("std", [0.0, -0.1, math.nan, math.inf])
def test_no_std_that_is_not_positive_and_finite_has_a_finite_log_prob(shape, backend, std):
    # a step with std 0 is sampled, and on a GPU nobody looks at the number before the kernel does
    outputs, rest = draw(Case((2, *shape[1:])))
    coef = coef_with(rest["coef"], std=torch.tensor(std))
    _, log_prob = gaussian_step(
        **outputs, latents=rest["latents"], coef=coef, seed=0, sample_id=torch.arange(2), step=0, backend=backend
    )
    assert not log_prob.isfinite().any()
    inputs = StepInputs(outputs["model_output"], rest["latents"], coef, next_latents=rest["next_latents"])
    log_prob = ops._module(backend).gaussian_log_prob(inputs)
    assert not log_prob.isfinite().any()


BAD_TENSORS = [*("model_output", "unconditional_output", "latents", "next_latents", "reference_output")]
BAD_TENSORS += ["old_log_prob", "advantages"]


@both_backends
@pytest.mark.parametrize("shape, clamp", [((6, 1, 5, 7), None), ((6, 1, 5, 7), 0.75), ((6, 1, 91, 91), 0.75)], ids=str)
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_nan_or_an_infinity_is_seen_in_its_sample_only(name, clamp, shape, backend):
    clean = draw(Case(shape, clamp=clamp, guidance=3.0, kl_weight=0.3))
    expected, expected_gradients = differentiate(clipped_surrogate, clean, backend=backend)
    hidden = []
    # samples that the clip decides (1 and 5) and that it does not
    for bad in ({0: math.nan, 1: math.inf, 5: -math.inf}, {5: math.nan, 2: math.inf, 0: -math.inf}):
        inputs = Inputs(dict(clean.outputs), dict(clean.rest))
        holder = inputs.outputs if name in inputs.outputs else inputs.rest
        holder[name] = holder[name].clone()
        for row, value in bad.items():
            holder[name][row].view(-1)[-1] = value
        result, gradients = differentiate(clipped_surrogate, inputs, backend=backend)
        for row, value in bad.items():
            if result.loss[row].isfinite() and all(gradient[row].isfinite().all() for gradient in gradients):
                hidden.append((value, row))
        others = [i for i in range(shape[0]) if i not in bad]
        assert torch.equal(result.loss[others], expected.loss[others])
        for gradient, good in zip(gradients, expected_gradients, strict=True):
            assert torch.equal(gradient[others], good[others])
    assert not hidden, f"{name}: (value, sample) with a finite loss and gradient: {hidden}"


@both_backends
@both_plans
def test_a_nan_stays_a_nan_in_the_sampler(shape, backend):
    outputs, rest = draw(Case(shape, clamp=0.75))
    for holder, name in ((outputs, "model_output"), (rest, "latents")):
        kept = holder[name]
        holder[name] = kept.clone()
        holder[name][1].view(-1)[3] = math.nan
        following, log_prob = gaussian_step(
            **outputs, latents=rest["latents"], coef=rest["coef"], seed=0, sample_id=torch.arange(6), step=0,
            backend=backend,
        )  # fmt: skip
        holder[name] = kept
        assert following.isnan().nonzero().tolist() == [[1, 0, 0, 3]]
        assert log_prob.isfinite().tolist() == [True, False, True, True, True, True]


@both_backends
@both_plans
@pytest.mark.parametrize("distance", [19.0, 25.0, 1e3, 1e30])
def test_a_ratio_that_would_overflow_stays_at_its_limit(distance, shape, backend):
    # exp overflows at 88; A < 0, so that no clip bounds the loss
    outputs, rest = draw(Case(shape))
    rest["advantages"] = -torch.linspace(0.5, 2, 6)

    def at(distance):
        return Inputs(outputs, rest | {"old_log_prob": rest["old_log_prob"] - distance})

    result, (gradient,) = differentiate(clipped_surrogate, at(distance), backend=backend)
    # beyond the limit all distances are one
    true, (correct,) = exact(at(min(distance, 25.0)))
    assert result.loss.isfinite().all() and gradient.isfinite().all() and gradient.flatten(1).any(1).all()
    assert float(result.ratio.max()) <= math.exp(LOG_RATIO_LIMIT) * (1 + 1e-5)
    # below the limit the rounding of a log-ratio near 20 is in front of everything: 2^-20 of it
    assert worst(result.ratio.double() / true.ratio - 1) <= 4e-6
    assert worst((gradient.double() - correct) / correct.abs().max()) <= 6e-6


@both_backends
@both_plans
def test_a_ratio_that_vanishes_is_zero(shape, backend):
    outputs, rest = draw(Case(shape))
    rest["old_log_prob"] = rest["old_log_prob"] + 1e3
    result, (gradient,) = differentiate(clipped_surrogate, Inputs(outputs, rest), backend=backend)
    assert not result.ratio.any() and not gradient.any() and result.loss.isfinite().all()
    assert result.outside.all() and result.clipped.tolist() == [A < 0 for A in rest["advantages"].tolist()]
