"""The cases hold what they claim, and the tolerances reject what is wrong."""

import math

import pytest
import torch

from hrf_kernels import eager, fused
from tests.kernels.cases import (
    BF16,
    FP32,
    OPTIONS,
    PREDICTIONS,
    REGIONS,
    Case,
    assert_within_tolerance,
    draw,
    exact,
    wide,
)


def test_the_cases_hold_what_they_claim():
    true, _ = exact(draw(Case()))
    # above (A > 0) and below (A < 0) are clipped
    assert true.clipped.tolist() == [False, True, False, False, False, True]
    assert true.outside.tolist() == [False, True, True, False, True, True]
    torch.testing.assert_close(true.ratio.log().float(), torch.tensor([x for x, _ in REGIONS]), atol=1e-6, rtol=0)
    for prediction in PREDICTIONS:
        outputs, rest = draw(Case(prediction=prediction, clamp=0.75))
        coef = wide(rest)["coef"]
        x0 = (coef.x0_latents * rest["latents"] + coef.x0_output * outputs["model_output"]).abs()
        assert 0.2 < float((x0 < 0.75).double().mean()) < 0.8
        assert prediction != "dyadic" or (x0.flatten()[:3] - 0.75).tolist() == [0, 0, 2**-23]


@pytest.mark.parametrize("output", [FP32, BF16])
def test_the_tolerances_reject_what_is_one_percent_off(output):
    inputs = draw(Case(output=output, **OPTIONS["all"]))
    true, expected = exact(inputs)
    gradients = [gradient.to(output) for gradient in expected]
    assert_within_tolerance((true, gradients), (true, expected))
    for field in ("loss", "log_prob", "ratio", "approx_kl", "kl"):
        off = true._replace(**{field: getattr(true, field) * 1.01})
        with pytest.raises(AssertionError):
            assert_within_tolerance((off, gradients), (true, expected))
    for field in ("outside", "clipped"):
        with pytest.raises(AssertionError):
            assert_within_tolerance((true._replace(**{field: ~getattr(true, field)}), gradients), (true, expected))
    for i, gradient in enumerate(gradients):
        # all of it, one element of it, one element that nobody wrote
        one, missing = gradient.clone(), gradient.clone()
        one.view(-1)[one.abs().argmax()] *= 1.01
        missing.view(-1)[7] = math.nan
        for off in (gradient * 1.01, one, missing):
            with pytest.raises(AssertionError):
                assert_within_tolerance((true, [*gradients[:i], off, *gradients[i + 1 :]]), (true, expected))


def test_the_tolerance_rejects_truncation_to_bfloat16():
    inputs = draw(Case(output=BF16))
    true, (expected,) = exact(inputs)
    truncated = (expected.float().view(torch.int32) & ~0xFFFF).view(FP32).to(BF16)
    assert_within_tolerance((true, [expected.to(BF16)]), (true, [expected]))
    with pytest.raises(AssertionError, match="rounding"):
        assert_within_tolerance((true, [truncated]), (true, [expected]))


def test_fresh_memory_is_nan_in_these_tests():
    for module in (eager, fused):
        assert module.torch.empty(3).isnan().all() and module.torch.empty_like(torch.ones(3, dtype=BF16)).isnan().all()
        assert module.torch.empty(3, dtype=torch.bool).view(torch.uint8).tolist() == [255] * 3
