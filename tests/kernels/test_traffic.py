"""Launches, and the bytes and sectors that the compiled kernels move, counted by the PTX machine per tensor."""

import math
from collections import Counter

import pytest
import torch

from benchmarks.kernel_bench.counting import TRITON
from hrf_kernels import clipped_surrogate, gaussian_log_prob, gaussian_step
from tests.kernels.cases import BF16, FP32, Case, draw
from tests.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the Triton interpreter counts nothing: run without it")

# aligned: rows of whole sectors, though no whole blocks
ONE, TWO = (4, 3, 16, 16), (2, 3, 64, 64)
SAMPLES = (
    "model_output", "unconditional", "reference", "latents", "next_latents", "gradient", "unconditional_gradient",
)  # fmt: skip
RAGGED = {"one program": (3, 3, 9, 11), "two stages": (2, 1, 91, 91)}
both_plans = pytest.mark.parametrize("shape", [ONE, TWO], ids=["one program", "two stages"])
dtypes = pytest.mark.parametrize("output, latents", [(FP32, FP32), (BF16, FP32), (BF16, BF16)], ids=str)


def train(inputs, upstream=None, gradient=True):
    outputs = {name: tensor.detach().requires_grad_(gradient) for name, tensor in inputs.outputs.items()}
    loss = clipped_surrogate(**outputs, **inputs.rest, backend="triton").loss
    if gradient:
        (loss.sum() if upstream is None else (loss * upstream).sum()).backward()
    return outputs


def kernels(machine):
    return [launch.kernel for launch in machine.launches]


def samples_of(launch):
    """(name, traffic) of its tensors of samples; others hold a few numbers each, and every thread asks for them."""
    return [(name, traffic) for name, traffic in launch.traffic.items() if name in SAMPLES]


def moved(machine):
    """(bytes read, bytes written) by the name of each tensor of samples that was touched."""
    read, written = Counter(), Counter()
    for launch in machine.launches:
        for name, traffic in samples_of(launch):
            read[name] += traffic.read_bytes
            written[name] += traffic.written_bytes
    return +read, +written


def bytes_of(shape, **tensors):
    """Bytes of sample-sized tensors by name, from (dtype, how often)."""
    return {name: math.prod(shape) * dtype.itemsize * times for name, (dtype, times) in tensors.items()}


def assert_whole_sectors(machine, inputs):
    """No sector is touched in part: each is fetched once."""
    narrow = min(inputs.outputs["model_output"].dtype.itemsize, inputs.rest["latents"].dtype.itemsize)
    widths = {"model_output": inputs.outputs["model_output"].dtype.itemsize}
    for launch in machine.launches:
        for name, traffic in samples_of(launch):
            # a thread has as many elements as 16 bytes of the narrowest tensor hold, so that it reads 32 bytes of a
            # tensor twice as wide by two instructions, and each of a warp's touches all sectors (the L1 has the other)
            wide = widths.get(name, inputs.rest["latents"].dtype.itemsize) // narrow
            assert traffic.read_bytes * wide == 32 * traffic.read_sectors, (launch.kernel, name)
            assert traffic.written_bytes == 32 * traffic.written_sectors, (launch.kernel, name)


@pytest.mark.parametrize(("name", "output"), [("fp32", FP32), ("bf16", BF16)])
@both_plans
def test_the_benchmark_counts_what_is_moved(machine, shape, name, output):
    train(draw(Case(shape, output=output, latents=FP32)))
    counted = TRITON[name]["two-stage" if shape == TWO else "one-program"]
    total = sum(sum(each.values()) for each in moved(machine))
    assert (total / (4 * math.prod(shape)), len(machine.launches)) == (counted.tensors, counted.calls)


@dtypes
@both_plans
def test_a_step_reads_two_tensors_and_writes_one(machine, shape, output, latents):
    outputs, rest = inputs = draw(Case(shape, output=output, latents=latents))
    gaussian_step(
        **outputs, latents=rest["latents"], coef=rest["coef"], seed=1, sample_id=torch.arange(shape[0]), step=0,
        backend="triton",
    )  # fmt: skip
    assert kernels(machine) == ["step_kernel"] + ["finalize_kernel"] * (shape == TWO)
    read, written = moved(machine)
    assert read == bytes_of(shape, model_output=(output, 1), latents=(latents, 1))
    assert written == bytes_of(shape, next_latents=(latents, 1))
    assert_whole_sectors(machine, inputs)


@dtypes
def test_one_program_reads_three_tensors_and_writes_the_gradient(machine, output, latents):
    inputs = draw(Case(ONE, output=output, latents=latents, clamp=0.75))
    train(inputs)
    # the backward pass looks at upstream, which is 1, and leaves the gradient alone
    assert kernels(machine) == ["one_program_kernel", "scale_kernel"]
    read, written = moved(machine)
    assert read == bytes_of(ONE, model_output=(output, 1), latents=(latents, 1), next_latents=(latents, 1))
    assert written == bytes_of(ONE, gradient=(output, 1))
    assert_whole_sectors(machine, inputs)
    assert machine.launches[1].traffic["gradient"].read_bytes == 0


@dtypes
def test_two_stages_read_three_tensors_forward_and_three_backward(machine, output, latents):
    inputs = draw(Case(TWO, output=output, latents=latents, clamp=0.75))
    train(inputs)
    assert kernels(machine) == ["sums_kernel", "finalize_kernel", "gradient_kernel"]
    read, written = moved(machine)
    assert read == bytes_of(TWO, model_output=(output, 2), latents=(latents, 2), next_latents=(latents, 2))
    assert written == bytes_of(TWO, gradient=(output, 1))
    assert_whole_sectors(machine, inputs)
    # the forward pass alone
    machine.launches.clear()
    train(inputs, gradient=False)
    read, written = moved(machine)
    assert read == bytes_of(TWO, model_output=(output, 1), latents=(latents, 1), next_latents=(latents, 1))
    assert written == {}


def test_one_program_writes_no_gradient_that_nobody_wants(machine):
    train(draw(Case(ONE)), gradient=False)
    assert kernels(machine) == ["one_program_kernel"]
    assert moved(machine)[1] == {}


@both_plans
def test_guidance_and_a_reference_cost_one_tensor_each_way(machine, shape):
    train(draw(Case(shape, guidance=3.0, kl_weight=0.3, output=BF16)))
    passes = 1 if shape == ONE else 2
    read, written = moved(machine)
    names = {"model_output": BF16, "unconditional": BF16, "reference": BF16, "latents": FP32, "next_latents": FP32}
    assert read == bytes_of(shape, **{name: (dtype, passes) for name, dtype in names.items()})
    assert written == bytes_of(shape, gradient=(BF16, 1), unconditional_gradient=(BF16, 1))


@both_plans
def test_the_log_prob_reads_three_tensors(machine, shape):
    outputs, rest = draw(Case(shape))
    gaussian_log_prob(**outputs, **{n: rest[n] for n in ("latents", "next_latents", "coef")}, backend="triton")
    assert kernels(machine) == ["sums_kernel"] + ["finalize_kernel"] * (shape == TWO)
    read, written = moved(machine)
    assert read == bytes_of(shape, model_output=(FP32, 1), latents=(FP32, 1), next_latents=(FP32, 1))
    assert written == {}


def test_only_samples_whose_upstream_is_not_one_are_scaled(machine):
    inputs = draw(Case(ONE))
    plain = train(inputs)["model_output"].grad.clone()
    machine.launches.clear()
    upstream = torch.tensor([1.0, 0.5, 1.0, -3.0])
    scaled = train(inputs, upstream)["model_output"].grad
    assert torch.equal(scaled, plain * upstream.view(-1, 1, 1, 1)) and plain[[1, 3]].any()
    half = math.prod(ONE) * 4 // 2
    assert kernels(machine) == ["one_program_kernel", "scale_kernel"]
    traffic = machine.launches[1].traffic["gradient"]
    assert (traffic.read_bytes, traffic.written_bytes) == (half, half)


@pytest.mark.parametrize("plan", RAGGED)
def test_ragged_samples_move_the_same_bytes_and_little_more_in_sectors(machine, plan):
    shape = RAGGED[plan]
    train(draw(Case(shape, clamp=0.75)))
    passes = 1 if plan == "one program" else 2
    read, written = moved(machine)
    names = ("model_output", "latents", "next_latents")
    assert read == bytes_of(shape, **{name: (FP32, passes) for name in names})
    assert written == bytes_of(shape, gradient=(FP32, 1))
    # a warp's 32 neighbours lie in 4 sectors, or 5 where they do not begin at one
    for launch in machine.launches:
        for _, traffic in samples_of(launch):
            assert 32 * traffic.read_sectors <= 1.3 * traffic.read_bytes
            assert 32 * traffic.written_sectors <= 1.3 * traffic.written_bytes


@both_plans
def test_no_tensor_of_a_samples_size_is_kept_but_inputs_and_gradient(machine, shape):
    outputs, rest = draw(Case(shape))
    output = outputs["model_output"].requires_grad_()
    inputs = {tensor.data_ptr() for tensor in (output, rest["latents"], rest["next_latents"])}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = clipped_surrogate(output, **rest, backend="triton").loss
    # two stages compute it all again; one program has the gradient already
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() >= output.numel()}
    assert len(large - inputs) == (1 if shape == ONE else 0)
    assert loss.requires_grad
