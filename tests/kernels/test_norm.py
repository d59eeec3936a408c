"""The group norm of channels-last memory: float64's numbers, and one plan whatever the batch."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hrf_kernels.norm import group_norm
from tests.kernels.conftest import CAPABILITIES, INTERPRETED
from tests.kernels.norms import BF16, FP16, FP32, SHAPES, assert_close, differentiate, distances, draw, exact, ours


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("silu", [False, True], ids=["norm", "norm and silu"])
@pytest.mark.parametrize("kind", SHAPES)
def test_output_and_gradients_are_those_of_float64(kind, silu, dtype, capability):
    shape, groups = SHAPES[kind]
    inputs = draw(shape, dtype)
    assert_close(differentiate(ours(groups, silu), *inputs), exact(groups, silu, *inputs), dtype)


def test_a_norm_by_hand():
    # two groups of two channels and two pixels: 1, 3, 5, 7 have mean 4 and variance 5
    inputs = torch.tensor([[[1.0, 3.0], [5.0, 7.0], [2.0, 2.0], [2.0, 2.0]]])
    weight, bias = torch.tensor([1.0, 2.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.5, -0.5])
    found = group_norm(inputs, weight, bias, 2, 0.0 + 1e-12)
    root = 5**0.5
    expected = [[-3 / root, -1 / root], [2 / root, 6 / root], [0.5, 0.5], [-0.5, -0.5]]
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-6, atol=1e-6)


def test_a_large_mean_does_not_cancel():
    shape, groups = SHAPES["several chunks"]
    inputs = draw(shape, FP32, mean=3000.0)
    assert max(distances(differentiate(ours(groups, True), *inputs), exact(groups, True, *inputs))) < 2e-4


def test_a_sample_has_the_same_bits_in_any_batch_and_memory_order():
    shape, groups = SHAPES["several chunks"]
    inputs, weight, bias, upstream = draw(shape, BF16)
    together = differentiate(ours(groups, True), inputs, weight, bias, upstream)
    alone = differentiate(ours(groups, True), inputs[1:], weight, bias, upstream[1:])
    contiguous = differentiate(ours(groups, True), inputs.contiguous(), weight, bias, upstream.contiguous())
    for number in range(2):
        assert torch.equal(together[number][1:], alone[number])
        assert torch.equal(together[number], contiguous[number])


def test_the_result_has_the_order_and_the_type_that_are_asked_for():
    inputs, weight, bias, _ = draw((2, 24, 5, 7), FP32)
    output = group_norm(inputs, weight, bias, 3, dtype=BF16)
    assert output.dtype == BF16 and output.is_contiguous(memory_format=torch.channels_last)


def test_frozen_weights_have_no_gradient_and_each_gradient_has_its_type():
    inputs, weight, bias, _ = draw((2, 24, 5, 7), BF16)
    inputs.requires_grad_()
    group_norm(inputs, weight, bias, 3).sum().backward()
    assert inputs.grad is not None and weight.grad is None
    weight, bias = weight.to(BF16).requires_grad_(), bias.to(FP16).requires_grad_()
    group_norm(inputs.detach(), weight, bias, 3).sum().backward()
    # of each channel 2 × 35 ones
    assert weight.grad.dtype == BF16 and torch.equal(bias.grad, torch.full((24,), 70.0, dtype=FP16))


def test_weights_in_strides_and_another_default_type_have_the_same_numbers(monkeypatch):
    inputs, weight, bias, _ = draw((2, 24, 5, 7), FP32)
    expected = group_norm(inputs, weight, bias, 3)
    pairs = torch.stack([weight, bias], 1)
    assert torch.equal(group_norm(inputs, pairs[:, 0], pairs[:, 1], 3), expected)
    torch.set_default_dtype(BF16)
    try:
        assert torch.equal(group_norm(inputs, weight, bias, 3), expected)
    finally:
        torch.set_default_dtype(FP32)


def test_the_output_may_be_changed_in_place_and_an_empty_batch_has_a_gradient():
    inputs, weight, bias, _ = draw((2, 24, 5, 7), FP32)
    inputs.requires_grad_()
    changed = group_norm(inputs, weight, bias, 3).mul_(2)
    assert torch.equal(changed, 2 * group_norm(inputs, weight, bias, 3))
    empty = group_norm(inputs[:0], weight, bias, 3, dtype=BF16)
    assert empty.shape == (0, 24, 5, 7) and empty.dtype == BF16 and empty.requires_grad


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing that could be launched again")
def test_a_kernel_is_launched_again_for_equal_types_numbers_and_addresses_only(machine, monkeypatch):
    monkeypatch.setattr("hrf_kernels.launch.remembers", lambda device: True)
    monkeypatch.setattr("hrf_kernels.launch._COMPILED", compiled := {})
    inputs, weight, bias, upstream = draw((2, 24, 5, 7), FP32)
    cases = [(inputs, weight, bias), (inputs, weight, bias.half()), (inputs.bfloat16(), weight, bias)]
    for case in [*cases, *cases[::-1]]:
        before = len(compiled)
        found = differentiate(ours(3, True), *case, upstream)
        # a gradient in half precision is rounded
        assert max(distances(found, exact(3, True, *case, upstream))) < 4e-3
    # the second time each one is there
    assert len(compiled) == before
    moved = torch.empty(inputs.numel() + 1)[1:].copy_(inputs.movedim(1, -1).flatten()).view(2, 5, 7, 24).movedim(-1, 1)
    assert moved.data_ptr() % 16
    assert torch.equal(group_norm(moved, weight, bias, 3), group_norm(inputs, weight, bias, 3))


@pytest.mark.parametrize(("channels", "groups"), [(24, 5), (24, 0), (16, 4)])
def test_what_does_not_fit_is_refused(channels, groups):
    inputs, weight, bias, _ = draw((1, channels, 2, 2), FP32)
    if (channels, groups) == (16, 4):
        weight = weight[1:]
    with pytest.raises(ValueError, match="multiple of the groups"):
        group_norm(inputs, weight, bias, groups)


def test_a_type_that_the_kernels_do_not_compute_in_is_refused():
    inputs, weight, bias, _ = draw((1, 24, 2, 2), FP32)
    for given in ((inputs.double(), weight, bias), (inputs, weight.double(), bias), (inputs, weight, bias.int())):
        with pytest.raises(TypeError, match="use float32, bfloat16 or float16"):
            group_norm(*given, 3)


def test_a_group_or_a_sample_that_is_too_large_is_refused():
    inputs, weight, bias, _ = draw((1, 4100, 1, 1), FP32)
    with pytest.raises(ValueError, match="4100 channels; the kernels take at most 4096: use more groups"):
        group_norm(inputs, weight, bias, 1)
    # nothing is launched for fake tensors
    with FakeTensorMode(), pytest.raises(ValueError, match="pixels of 16 channels; the kernels take at most"):
        group_norm(torch.empty(1, 16, 2**28), torch.empty(16), torch.empty(16), 4)


@pytest.mark.skipif(INTERPRETED, reason="the Triton interpreter counts nothing: run without it")
def test_forward_and_backward_take_three_launches_each_and_read_the_inputs_in_two_of_them(machine):
    inputs, weight, bias, upstream = draw((2, 128, 16, 16), BF16)
    differentiate(ours(32, True), inputs, weight, bias, upstream)
    size = inputs.numel() * inputs.element_size()
    traffic = [{name: each for name, each in launch.traffic.items()} for launch in machine.launches]
    assert len(traffic) == 6
    # the first pixel of a chunk once more, for each row of a block
    assert size <= traffic[0]["inputs"].read_bytes <= 3 * size
    assert traffic[2]["inputs"].read_bytes == traffic[2]["output"].written_bytes == size
    for number in (3, 5):
        assert traffic[number]["inputs"].read_bytes == traffic[number]["gradient"].read_bytes == size
    assert traffic[5]["result"].written_bytes == size
