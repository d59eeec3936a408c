"""Group norms of channels-last memory on the device, against float64."""

import pytest
import torch

from hrf_kernels.norm import group_norm
from tests.kernels.norms import BF16, FP16, FP32, SHAPES, assert_close, differentiate, draw, exact, ours

# those of a DDPM of 256 pixels, of Stable Diffusion 1.5 and of its attention's tokens
LARGE = {
    "256 pixels": ((3, 128, 256, 256), 32),
    "320 channels": ((2, 320, 64, 64), 32),
    "1920 channels": ((2, 1920, 16, 16), 32),
    "tokens": ((2, 320, 4096), 32),
}


@pytest.mark.parametrize("silu", [False, True], ids=["norm", "norm and silu"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("kind", [*SHAPES, *LARGE])
def test_group_norms_are_those_of_float64_and_repeat_to_the_bit(needs_cuda, device, kind, dtype, silu):
    shape, groups = {**SHAPES, **LARGE}[kind]
    inputs = draw(shape, dtype, device=device)
    found = differentiate(ours(groups, silu), *inputs)
    assert_close(found, exact(groups, silu, *inputs), dtype)
    # the second time kernels are launched as they were compiled
    for first, second in zip(found, differentiate(ours(groups, silu), *inputs), strict=True):
        assert torch.equal(first, second)
    alone = group_norm(inputs[0][-1:], *inputs[1:3], groups, 1e-6, silu=silu)
    assert torch.equal(alone, found[0][-1:])


def test_an_address_that_is_no_multiple_of_16_has_the_same_numbers(needs_cuda, device):
    shape, groups = SHAPES["ragged"]
    inputs, weight, bias, _ = draw(shape, FP32, device=device)
    expected = group_norm(inputs, weight, bias, groups)
    moved = torch.empty(inputs.numel() + 1, device=device)[1:].copy_(inputs.movedim(1, -1).flatten())
    moved = moved.view(inputs.movedim(1, -1).shape).movedim(-1, 1)
    assert moved.data_ptr() % 16
    for _ in range(2):
        assert torch.equal(group_norm(moved, weight, bias, groups), expected)
