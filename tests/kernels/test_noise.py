"""Philox noise in `gaussian_step`: both backends draw the same numbers, and a sample's do not depend on its batch."""

import math

import pytest
import torch
import triton
import triton.language as tl

from hrf_kernels import StepCoefficients, fused, gaussian_step, philox_normal, reference
from hrf_kernels.coefficients import StepInputs
from hrf_kernels.philox import philox
from tests.kernels.cases import BACKENDS, DTYPES, FP32, Case, both_backends, draw, ulp, wide, worst

both_plans = pytest.mark.parametrize("shape", [(3, 3, 9, 11), (2, 1, 91, 91)], ids=["one program", "two stages"])

# (seed, sample id, step): each word of the counter and the key, and their largest values
KEYS = [
    (0, 0, 0),
    (1, 0, 0),
    (2**32 - 1, 1, 1),
    (2**32, 2**31 - 1, 39),
    (2**31, 2**31, 2**31 - 1),
    (2**63 + 12345, 2**32 - 1, 2**31),
    (2**64 - 1, 6, 2**32 - 1),
]

# floats: the logarithm and the polynomial sine of Box and Muller, to an ulp of a number below 5.8
NOISE_TOLERANCE = 2e-6


def noise_of(shape, seed, sample_id, step, **options):
    """What gaussian_step adds: mean 0 and std 1."""
    zero, one = torch.zeros(()), torch.ones(())
    coef = StepCoefficients(zero, zero, zero, zero, zero, one)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    key = {"seed": seed, "sample_id": torch.as_tensor(sample_id), "step": step}
    return gaussian_step(latents, latents, coef, **key, **options)[0]


@pytest.mark.parametrize("seed, sample, step", KEYS)
def test_triton_draws_the_noise_of_philox_normal(seed, sample, step):
    ids = [sample, 3, sample]
    found = noise_of((3, 3, 9, 11), seed, ids, step, backend="triton")
    expected = philox_normal((3, 9, 11), seed=seed, sample_id=torch.tensor(ids), step=step)
    torch.testing.assert_close(found, expected, atol=NOISE_TOLERANCE, rtol=0)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


# arguments of 0 and 1 would be compiled in
@triton.jit(do_not_specialize=["step", "key_low", "key_high"])
def words_kernel(words, sample_id, step, key_low, key_high, quads, BLOCK: tl.constexpr):
    """The four words of counters (quad, step, sample_id, 0), as formulas.normal_noise asks for them."""
    quad = tl.arange(0, BLOCK).to(tl.uint32)
    zero = quad * 0
    sample = tl.load(sample_id)
    w0, w1, w2, w3 = tl.philox_impl(
        quad, zero + step.to(tl.uint32), zero + sample.to(tl.uint32), zero,
        key_low.to(tl.uint32), key_high.to(tl.uint32),
    )  # fmt: skip
    place = tl.arange(0, BLOCK)
    mask = place < quads
    tl.store(words + place, w0.to(tl.int64), mask=mask)
    tl.store(words + quads + place, w1.to(tl.int64), mask=mask)
    tl.store(words + 2 * quads + place, w2.to(tl.int64), mask=mask)
    tl.store(words + 3 * quads + place, w3.to(tl.int64), mask=mask)


@pytest.mark.parametrize("seed, sample, step", KEYS)
def test_the_words_are_equal_to_the_bit(seed, sample, step):
    quads = 60
    words = torch.full((4, quads), -1)
    signed = [fused._word(value) for value in (step, seed, seed >> 32)]
    words_kernel[(1,)](words, torch.tensor([sample]), *signed, quads, BLOCK=64, enable_fp_fusion=False)
    counter = torch.arange(quads)
    zero = torch.zeros_like(counter)
    assert torch.equal(words, torch.stack(philox((counter, zero + step, zero + sample, zero), seed)))


@both_plans
@pytest.mark.parametrize("output, latents", DTYPES, ids=str)
def test_next_latents_are_the_references(shape, output, latents):
    case = Case(shape, output=output, latents=latents, clamp=0.75, guidance=3.0)
    outputs, rest = draw(case, seed=30)
    policy = {**outputs, **{name: rest[name] for name in ("latents", "coef", "guidance_scale")}}
    key = {"seed": 2**40 + 1, "sample_id": torch.arange(shape[0]), "step": 7}
    truth, _ = reference.gaussian_step(**wide(policy), **key)
    for backend in BACKENDS:
        found, _ = gaussian_step(**policy, **key, backend=backend)
        # half an ulp of the stored dtype, after the error of a mean and a noise in float32
        beyond = ((found.double() - truth).abs() - 3e-6 * (1 + truth.abs())).clamp(min=0)
        assert worst(beyond / ulp(truth, latents)) <= (0 if latents == FP32 else 0.5)


@both_backends
@both_plans
def test_the_next_latents_do_not_depend_on_how_a_batch_is_split(backend, shape):
    batch = 4
    outputs, rest = draw(Case((batch, *shape[1:]), clamp=0.75), seed=31)
    ids = torch.tensor([4, 0, 2**32 - 1, 7])

    def run(rows):
        policy = {"model_output": outputs["model_output"][rows], "latents": rest["latents"][rows], "coef": rest["coef"]}
        return gaussian_step(**policy, seed=2**63, sample_id=ids[rows], step=2, backend=backend)

    next_latents, log_prob = run(torch.arange(batch))
    for rows in ([0], [1, 2], [3, 1, 0], [3, 2, 1, 0]):
        part, part_log_prob = run(torch.tensor(rows))
        assert torch.equal(part, next_latents[rows])
        assert torch.equal(part_log_prob, log_prob[rows])


def test_the_noise_does_not_depend_on_the_block_plan():
    outputs, rest = draw(Case((2, 2, 45, 45)), seed=32)
    ids = torch.arange(2)
    inputs = StepInputs(outputs["model_output"], rest["latents"], rest["coef"])
    one, one_log_prob = fused.gaussian_step(inputs, 5, ids, 1, one_program=True)
    two, two_log_prob = fused.gaussian_step(inputs, 5, ids, 1, one_program=False)
    assert torch.equal(one, two)
    # the same sum in another order
    torch.testing.assert_close(one_log_prob, two_log_prob, atol=1e-6, rtol=0)


@both_backends
def test_the_noise_is_standard_normal(backend):
    x = noise_of((2, 1, 91, 91), 9, [0, 1], 1, backend=backend).double().flatten()
    n = len(x)
    # four standard errors each: 1/sqrt(n), sqrt(2/n), sqrt(15/n), sqrt(96/n)
    assert abs(float(x.mean())) < 4 * math.sqrt(1 / n)
    assert abs(float(x.square().mean()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float(x.pow(3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float(x.pow(4).mean()) - 3) < 4 * math.sqrt(96 / n)
    # neighbours share a counter, and elements 4 apart a word's place
    for lag in (1, 2, 3, 4):
        assert abs(float((x[:-lag] * x[lag:]).mean())) < 4 / math.sqrt(n)


@both_plans
def test_the_log_prob_is_that_of_the_next_latents(shape):
    # z is the noise itself, so that log_prob = -mean(noise²)/2 - log std - log(2π)/2 in float64
    outputs, rest = draw(Case(shape), seed=33)
    ids = torch.arange(shape[0])
    _, found = gaussian_step(
        **outputs, latents=rest["latents"], coef=rest["coef"], seed=3, sample_id=ids, step=0, backend="triton"
    )
    noise = philox_normal(shape[1:], seed=3, sample_id=ids, step=0).double()
    std = rest["coef"].std.double()
    expected = -noise.square().flatten(1).mean(1) / 2 - std.log() - math.log(2 * math.pi) / 2
    # the float32 next latents hold the noise to 2^-24/std
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)


@both_backends
def test_sampling_leaves_torchs_generator_alone(backend):
    before = torch.random.get_rng_state()
    noise_of((2, 1, 4, 4), 9, [0, 1], 1, backend=backend)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.slow
def test_many_counters_give_the_noise_of_philox_normal():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        seed, step = (int(torch.randint(2**62, (), generator=generator)) >> shift for shift in (0, 30))
        ids = torch.randint(2**32, (3,), generator=generator)
        found = noise_of((3, 1, 40, 40), seed, ids, step, backend="triton")
        expected = philox_normal((1, 40, 40), seed=seed, sample_id=ids, step=step)
        torch.testing.assert_close(found, expected, atol=NOISE_TOLERANCE, rtol=0)
