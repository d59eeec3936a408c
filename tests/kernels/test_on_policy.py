"""Sampler to trainer: a step that is scored again under the same weights has a ratio of exactly 1."""

import itertools

import pytest
import torch

from hrf_fast.policies.flow_sampler import flow_coefficients
from hrf_kernels import StepCoefficients, clipped_surrogate, gaussian_log_prob, gaussian_step
from tests.kernels.cases import BF16, FP16, FP32, Case, both_backends, draw, sweep
from tests.kernels.conftest import CAPABILITIES

SHAPES = {
    "one program, aligned": (3, 3, 8, 8),
    "one program, ragged": (3, 3, 9, 11),
    "two stages, aligned": (2, 3, 64, 64),
    "two stages, ragged": (2, 1, 91, 91),
}
RAGGED = [SHAPES["one program, ragged"], SHAPES["two stages, ragged"]]
both_plans = pytest.mark.parametrize("shape", [(6, 3, 9, 11), (6, 1, 91, 91)], ids=["one program", "two stages"])
DTYPES = {"fp32": (FP32, FP32), "mixed": (BF16, FP32), "bf16": (BF16, BF16), "fp16": (FP16, FP16)}
OPTIONS = {
    "plain": {},
    "clamp": {"clamp": 0.75},
    "guidance": {"guidance": 3.0},
    "clamp and guidance": {"clamp": 0.75, "guidance": 3.0},
}


def make(shape, dtypes="fp32", **options):
    """(arguments of the policy, sample ids)."""
    output, latents = DTYPES[dtypes]
    outputs, rest = draw(Case(shape, output=output, latents=latents, **options), seed=20)
    names = ("latents", "coef", "guidance_scale")
    return {**outputs, **{name: rest[name] for name in names if name in rest}}, torch.arange(7, 7 + shape[0])


def part_of(policy, rows):
    """The same for some rows of the batch."""
    return {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in policy.items()}


def assert_on_policy(policy, next_latents, old_log_prob, backend):
    batch = len(next_latents)
    policy = dict(policy)
    latents, coef = policy.pop("latents"), policy.pop("coef")
    rest = {"latents": latents, "next_latents": next_latents, "coef": coef}
    assert torch.equal(gaussian_log_prob(**policy, **rest, backend=backend), old_log_prob)
    advantages = torch.linspace(-1, 2, batch)
    for leaf in (False, True):
        # with and without a gradient: not the same kernel
        policy["model_output"] = policy["model_output"].detach().requires_grad_(leaf)
        result = clipped_surrogate(
            **policy, **rest, old_log_prob=old_log_prob, advantages=advantages, clip_range=0.0, backend=backend
        )
        assert torch.equal(result.log_prob, old_log_prob)
        assert torch.equal(result.ratio, torch.ones(batch))
        assert not result.outside.any() and not result.clipped.any()
        assert not result.approx_kl.any() and not result.kl.any()
        assert torch.equal(result.loss.detach(), -advantages)


def check(policy, sample_id, backend, **key):
    key = {"seed": 2**40 + 5, "step": 3} | key
    next_latents, log_prob = gaussian_step(**policy, sample_id=sample_id, **key, backend=backend)
    assert next_latents.dtype == policy["latents"].dtype and log_prob.isfinite().all()
    assert_on_policy(policy, next_latents, log_prob, backend)


@both_backends
@pytest.mark.parametrize("dtypes", sweep(["fp32", "mixed", "bf16"], ["fp32", "bf16"]))
@pytest.mark.parametrize("plan", ["one program", "two stages"])
def test_the_ratio_is_exactly_one(backend, plan, dtypes):
    # all combinations with the sizes are in the slow sweep below
    check(*make(SHAPES[f"{plan}, aligned"], dtypes), backend)
    check(*make(SHAPES[f"{plan}, ragged"], dtypes, **OPTIONS["clamp and guidance"]), backend)


@both_backends
@pytest.mark.parametrize("dtypes", sweep(["fp32", "mixed", "bf16", "fp16"], ["mixed"]))
def test_the_ratio_is_exactly_one_for_samples_of_one_element(backend, dtypes):
    # compiles to other code: the only lane with an element is known beforehand
    check(*make((3, 1), dtypes, **OPTIONS["clamp and guidance"]), backend)


@pytest.mark.parametrize("capability", CAPABILITIES[1:])
@pytest.mark.parametrize("dtypes", sweep(["fp32", "mixed"], ["mixed"]))
def test_the_ratio_is_exactly_one_on_sm_80(capability, dtypes):
    check(*make(SHAPES["one program, aligned"], dtypes, **OPTIONS["clamp and guidance"]), "triton")
    check(*make(SHAPES["two stages, ragged"], dtypes, **OPTIONS["clamp and guidance"]), "triton")


@both_backends
@both_plans
@pytest.mark.parametrize("option", sweep(["clamp", "guidance"], ["guidance"]))
def test_each_option_alone(backend, shape, option):
    check(*make(shape, "fp16", **OPTIONS[option]), backend)


@both_backends
@both_plans
def test_coefficients_per_sample(backend, shape):
    check(*make(shape, "mixed", per_sample=True, clamp=0.75), backend)


@both_backends
@both_plans
def test_steps_of_flow_matching(backend, shape):
    policy, sample_id = make(shape, "mixed", guidance=3.0)
    for kind in ("flow_sde", "dance_sde", "cps"):
        table = flow_coefficients(torch.tensor([1.0, 0.6, 0.2, 0.0]), kind=kind, noise_level=0.5)
        for step in (0, 1):
            check(policy | {"coef": table[step]}, sample_id, backend)


@both_backends
def test_a_large_image(backend):
    check(*make((1, 3, 256, 256), "mixed", clamp=0.75), backend)


@both_backends
@both_plans
@pytest.mark.parametrize("dtypes", sweep(["fp32", "bf16"], ["bf16"]))
@pytest.mark.parametrize("option", sweep(["clamp", "clamp and guidance"], ["clamp and guidance"]))
def test_training_may_split_the_batch_otherwise_than_sampling(backend, shape, dtypes, option):
    policy, sample_id = make(shape, dtypes, **OPTIONS[option])
    sampled = [
        gaussian_step(**part_of(policy, rows), sample_id=sample_id[rows], seed=1, step=0, backend=backend)
        for rows in (slice(0, 4), slice(4, 5), slice(5, 6))
    ]
    next_latents, log_prob = (torch.cat(column) for column in zip(*sampled, strict=True))
    for rows in (slice(0, 6), slice(0, 1), slice(1, 3), slice(3, 6)):
        assert_on_policy(part_of(policy, rows), next_latents[rows], log_prob[rows], backend)


@both_plans
def test_training_may_stack_steps_as_coefficients_per_sample(shape):
    # the fused kernels only: torch's log rounds a scalar otherwise than a vector, so the eager update does not mix
    policy, sample_id = make(shape, clamp=0.75)
    next_latents, log_prob = gaussian_step(**policy, sample_id=sample_id, seed=1, step=0, backend="triton")
    stacked = {name: value.expand(len(sample_id)).contiguous() for name, value in policy["coef"].tensors().items()}
    policy["coef"] = StepCoefficients(**stacked, x0_clip=0.75)
    assert_on_policy(policy, next_latents, log_prob, "triton")


@both_backends
@pytest.mark.parametrize("shape", sweep(SHAPES.values(), RAGGED), ids=SHAPES)
@pytest.mark.parametrize("option", sweep(["plain", "guidance"], ["guidance"]))
def test_it_does_not_matter_where_in_memory_the_tensors_of_training_begin(backend, shape, option):
    policy, sample_id = make(shape, "mixed", **OPTIONS[option])
    next_latents, log_prob = gaussian_step(**policy, sample_id=sample_id, seed=1, step=0, backend=backend)

    def shifted(tensor):
        room = torch.cat([tensor.new_zeros(1), tensor.flatten()])
        return room[1:].view(tensor.shape)

    # both outputs of a guided call are halves of one tensor
    outputs = [name for name in policy if name.endswith("output")]
    policy |= {name: shifted(policy[name]) for name in (*outputs, "latents")}
    assert policy["latents"].data_ptr() % 16 and policy["latents"].is_contiguous()
    assert_on_policy(policy, shifted(next_latents), log_prob, backend)


@both_backends
@both_plans
def test_a_model_that_is_its_own_reference_has_no_kl(backend, shape):
    policy, sample_id = make(shape, "mixed", clamp=0.75)
    next_latents, log_prob = gaussian_step(**policy, sample_id=sample_id, seed=1, step=0, backend=backend)
    output = policy.pop("model_output").requires_grad_()
    advantages = torch.zeros(len(sample_id))
    result = clipped_surrogate(
        output, **policy, next_latents=next_latents, old_log_prob=log_prob, advantages=advantages, clip_range=0.1,
        reference_output=output.detach(), kl_weight=1e6, backend=backend,
    )  # fmt: skip
    result.loss.sum().backward()
    assert not result.kl.any() and not result.loss.any() and not output.grad.any()


@both_plans
def test_other_weights_have_another_ratio(shape):
    # so that the tests above can fail: 1e-4 of the output shifts the ratio by more than the clip range of training
    policy, sample_id = make(shape)
    next_latents, log_prob = gaussian_step(**policy, sample_id=sample_id, seed=1, step=0, backend="triton")
    policy["model_output"] = policy["model_output"] * 1.001
    with pytest.raises(AssertionError):
        assert_on_policy(policy, next_latents, log_prob, "triton")


@pytest.mark.slow
@both_backends
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_ratio_is_exactly_one_for_every_combination(capability, backend, shape, dtypes):
    for prediction, option in itertools.product(("epsilon", "sample", "v"), OPTIONS.values()):
        check(*make(shape, dtypes, prediction=prediction, **option), backend)
