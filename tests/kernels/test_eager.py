"""The eager backend: it agrees with Triton, and its cache blocks and rows leave no seam."""

import pytest
import torch

import hrf_kernels.eager
from hrf_kernels import StepCoefficients, clipped_surrogate, gaussian_log_prob, gaussian_step, reference
from tests.kernels.cases import (
    DTYPES,
    ONE,
    OPTIONS,
    TOLERANCE,
    TWO,
    Case,
    Inputs,
    assert_within_tolerance,
    coef_with,
    differentiate,
    draw,
    exact,
    worst,
)

both_plans = pytest.mark.parametrize("shape", [ONE, TWO], ids=["one program", "two stages"])


def assert_log_probs_agree(inputs):
    with torch.no_grad():
        eager, triton = (
            clipped_surrogate(**inputs.outputs, **inputs.rest, backend=name).log_prob for name in ("eager", "triton")
        )
    assert worst(eager - triton) <= TOLERANCE["backends"]


@both_plans
@pytest.mark.parametrize("option", OPTIONS)
def test_log_probs_are_tritons(shape, option):
    assert_log_probs_agree(draw(Case(shape, **OPTIONS[option]), seed=40))


@both_plans
@pytest.mark.parametrize("output, latents", DTYPES, ids=str)
def test_log_probs_are_tritons_in_every_dtype(shape, output, latents):
    assert_log_probs_agree(draw(Case(shape, output=output, latents=latents, clamp=0.75), seed=41))


def test_log_probs_are_tritons_for_a_large_image():
    assert_log_probs_agree(draw(Case((1, 3, 256, 256), clamp=0.75), seed=42))


@both_plans
def test_ratios_of_samples_that_the_other_backend_drew_are_nearly_one(shape):
    # a run may be resumed on another machine: far below a clip range of 1e-4
    outputs, rest = draw(Case(shape, clamp=0.75), seed=43)
    policy = {**outputs, "latents": rest["latents"], "coef": rest["coef"]}
    for first, second in (("eager", "triton"), ("triton", "eager")):
        following, old = gaussian_step(**policy, seed=0, sample_id=torch.arange(shape[0]), step=0, backend=first)
        log_prob = gaussian_log_prob(**policy, next_latents=following, backend=second)
        assert worst(log_prob - old) <= TOLERANCE["backends"]


def test_a_step_is_the_references():
    outputs, rest = draw(Case(ONE, clamp=0.75, guidance=3.0), seed=44)
    policy = {**outputs, **{name: rest[name] for name in ("latents", "coef", "guidance_scale")}}
    key = {"seed": 5, "sample_id": torch.arange(ONE[0]), "step": 2}
    found, expected = gaussian_step(**policy, **key, backend="eager"), reference.gaussian_step(**policy, **key)
    # an ulp of numbers below 8
    torch.testing.assert_close(found[0], expected[0], atol=5e-7, rtol=0)
    torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=0)


# --- cache blocks and rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 297, 1000, 2**18])
@pytest.mark.parametrize("option", ["plain", "all"])
def test_results_do_not_depend_on_the_size_of_a_block(monkeypatch, block, option):
    # 8 samples of 297 elements, one, one, three (the last block has two) and all at a time
    inputs = draw(Case((8, 3, 9, 11), **OPTIONS[option]), seed=45)
    whole, whole_gradients = differentiate(clipped_surrogate, inputs, backend="eager")
    policy = {**inputs.outputs, **{n: v for n, v in inputs.rest.items() if n in ("latents", "coef", "guidance_scale")}}
    key = {"seed": 5, "sample_id": torch.arange(8), "step": 2, "backend": "eager"}
    step = gaussian_step(**policy, **key)
    monkeypatch.setattr(hrf_kernels.eager, "_BLOCK", block)
    parts, gradients = differentiate(clipped_surrogate, inputs, backend="eager")
    for name, ours, theirs in zip(parts._fields, parts, whole, strict=True):
        assert torch.equal(ours, theirs), name
    assert all(torch.equal(a, b) for a, b in zip(gradients, whole_gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gaussian_step(**policy, **key), step, strict=True))


def test_a_batch_of_several_real_blocks():
    # 2^18 elements to a block: four samples, four, one
    inputs = draw(Case((9, 1, 256, 256), clamp=0.75, per_sample=True), seed=46)
    assert hrf_kernels.eager._BLOCK == 2**18
    assert_within_tolerance(differentiate(clipped_surrogate, inputs, backend="eager"), exact(inputs))


# rows of 4096, of 64, and one row of all: where the size has no large power of two
@pytest.mark.parametrize(
    "shape", [(2, 3, 128, 128), (2, 3, 24, 40), (2, 3, 255, 255), (2, 1, 1, 2), (1, 300007)], ids=str
)
def test_sums_keep_their_digits(shape):
    inputs = draw(Case(shape), seed=47)
    assert_within_tolerance(differentiate(clipped_surrogate, inputs, backend="eager"), exact(inputs))


def test_a_mean_without_latents_for_some_samples_only():
    # epsilon prediction has no term in the latents, which is left out then; a mixed batch has it
    outputs, rest = draw(Case(ONE, prediction="v", per_sample=True), seed=48)
    mean_latents = rest["coef"].mean_latents.clone()
    mean_latents[::2] = 0
    rest["coef"] = coef_with(rest["coef"], mean_latents=mean_latents)
    inputs = Inputs(outputs, rest)
    assert_within_tolerance(differentiate(clipped_surrogate, inputs, backend="eager"), exact(inputs))


def test_a_loss_scale_saves_fp16_gradients_that_would_round_to_zero():
    # 1e-4·z/(768·0.5) is about 3e-7, a few subnormals of fp16; times 65536 it keeps its 11 bits
    generator = torch.Generator().manual_seed(0)
    output, latents, following = (torch.randn(4, 3, 16, 16, generator=generator) for _ in range(3))
    coef = StepCoefficients(*(torch.tensor(value) for value in (1.3, -0.8, 0.7, 0.2, 0.3, 0.5)))
    old = reference.gaussian_log_prob(output.half(), latents, following, coef)
    advantages = torch.tensor([1e-4, -1e-4, 5e-5, -5e-5])
    gradients = []
    for function, dtype in ((clipped_surrogate, torch.float16), (reference.clipped_surrogate, torch.float64)):
        leaf = output.half().to(dtype).requires_grad_()
        (function(leaf, latents, following, coef, old, advantages, 0.1).loss.sum() * 65536).backward()
        gradients.append(leaf.grad.double())
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-3
