"""A group norm over channels-last memory, with SiLU behind it if asked for; the Triton kernels' launches.

torch's own group norm on CUDA makes its input contiguous, which turns the order that convolutions prefer around and
back at every norm. Here nothing is copied, and of a norm and its SiLU only the norm's input is kept for the backward.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from hrf_kernels.checks import FLOATS
from hrf_kernels.launch import check_device, relaunch
from hrf_kernels.norm_kernels import (
    gradient_sums_kernel,
    group_moments_kernel,
    group_sums_kernel,
    input_gradient_kernel,
    moments_kernel,
    normalise_kernel,
)

# elements of a block, 16 of each thread
_BLOCK, _THREADS = 4096, 256
_BLOCK_CHANNELS = 128
# chunks of a sample, and elements of their sums that one program of a group reads: more would spill
_CHUNKS, _SUMS = 64, 4096
# blocks of an elementwise program
_BLOCKS = 4
# offsets in a sample have 32 bits, and chunks are CUDA's grid axis y
_LARGEST_SAMPLE, _LARGEST_GRID = 2**31 - 2**16, 65_535


def group_norm(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Group norm (Wu and He 2018, arXiv 1803.08494) in Triton, and SiLU of it; all sums in fp32 and fixed order.

    Args:
        inputs: [B, C, …]; copied unless its memory is channels-last, as a [B, pixels, C] transposed is.
        weight, bias: [C]; silu: multiply the result by its sigmoid.
        dtype: of the result; that of the inputs by default.

    Returns:
        As `inputs` in shape, channels-last in memory; differentiable once.

    Raises:
        TypeError: a type other than fp32, bf16 and fp16.
        ValueError: channels that are no multiple of groups, over 4096 channels in a group, too large a sample, tensors
            on different devices, or no GPU for Triton.
    """
    channels = inputs.shape[1]
    if groups < 1 or channels % groups or weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"{channels} channels, {groups} groups, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not "
            "fit: the channels must be a multiple of the groups, weight and bias [channels]"
        )
    for tensor in (inputs, weight, bias):
        if tensor.dtype not in FLOATS:
            raise TypeError(f"a tensor is {tensor.dtype}; use float32, bfloat16 or float16")
    if not inputs.device == weight.device == bias.device:
        raise ValueError(
            f"inputs are on {inputs.device}, weight on {weight.device} and bias on {bias.device}; move them"
        )
    if not inputs.numel():
        return inputs.to(dtype or inputs.dtype, copy=True)
    # a plan is made of fake tensors, for which nothing is launched
    if inputs.device.type != "cuda" and not isinstance(inputs, FakeTensor):
        check_device(inputs.device)
    weights = weight.contiguous(), bias.contiguous()
    result: Tensor = _GroupNorm.apply(inputs, *weights, groups, float(eps), silu, dtype or inputs.dtype)
    return result


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, dtype: torch.dtype
    ) -> Tensor:
        plan, inputs = _plan(math.prod(inputs.shape[2:]), inputs.shape[1], groups), _channels_last(inputs)
        moments, statistics = plan.of_chunks(inputs), plan.of_groups(inputs)
        _launch(
            moments_kernel, plan.over(inputs, plan.chunks), inputs, moments, *plan.sizes[:2], plan.rows, *plan.blocks
        )
        _launch(
            group_moments_kernel, plan.over_groups(inputs),
            moments, statistics, *plan.sizes, plan.rows, plan.chunks, eps, *plan.group_blocks,
        )  # fmt: skip
        output = torch.empty_strided(inputs.shape, inputs.stride(), dtype=dtype, device=inputs.device)
        _launch(
            normalise_kernel, plan.over(inputs, plan.parts),
            inputs, output, statistics, weight, bias, *plan.sizes, plan.part, silu, *plan.blocks,
        )  # fmt: skip
        ctx.save_for_backward(inputs, weight, bias, statistics)
        ctx.plan, ctx.silu = plan, silu
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias, statistics = ctx.saved_tensors
        plan, gradient = ctx.plan, _channels_last(gradients[0])
        sums = plan.of_chunks(inputs)
        _launch(
            gradient_sums_kernel, plan.over(inputs, plan.chunks),
            inputs, gradient, sums, statistics, weight, bias, *plan.sizes, plan.rows, ctx.silu, *plan.blocks,
        )  # fmt: skip
        of_channels, of_groups = plan.fp32(inputs, plan.channels), plan.of_groups(inputs)
        _launch(
            group_sums_kernel, plan.over_groups(inputs),
            sums, weight, of_channels, of_groups,
            *plan.sizes[1:], plan.chunks, plan.pixels * plan.group_size, *plan.group_blocks,
        )  # fmt: skip
        result = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            result = torch.empty_strided(inputs.shape, inputs.stride(), dtype=inputs.dtype, device=inputs.device)
            _launch(
                input_gradient_kernel, plan.over(inputs, plan.parts),
                inputs, gradient, result, statistics, weight, bias, of_groups,
                *plan.sizes, plan.part, ctx.silu, *plan.blocks,
            )  # fmt: skip
        if any(ctx.needs_input_grad[1:3]):
            of_bias, of_weight = of_channels.sum(1).unbind()
            of_bias, of_weight = of_bias.to(bias.dtype), of_weight.to(weight.dtype)
        return result, of_weight, of_bias, None, None, None, None


def _launch(kernel: Any, grid: tuple[int, int, int], *arguments: Any) -> None:
    first: Tensor = arguments[0]
    if not isinstance(first, FakeTensor):
        # a program of a group has few numbers
        threads = 128 if kernel in (group_moments_kernel, group_sums_kernel) else _THREADS
        relaunch(kernel, grid, first.device, *arguments, threads=threads)


@dataclass(frozen=True)
class _Plan:
    """How a sample of [pixels, channels] is cut; the batch has no part in it."""

    pixels: int
    channels: int
    groups: int
    group_size: int
    blocks: tuple[int, int]
    """Pixels and channels of a block."""
    rows: int
    """Pixels of a chunk whose sums one program takes, a multiple of a block's; `chunks` of them."""
    chunks: int
    part: int
    """Pixels of a chunk that one program computes by itself; `parts` of them."""
    parts: int
    group_blocks: tuple[int, int]
    """Chunks and channels of a group, each the next power of two."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.pixels, self.channels, self.group_size

    def over(self, inputs: Tensor, chunks: int) -> tuple[int, int, int]:
        """A program for each sample, chunk of pixels and block of channels."""
        return len(inputs), chunks, triton.cdiv(self.channels, self.blocks[1])

    def over_groups(self, inputs: Tensor) -> tuple[int, int, int]:
        return len(inputs), self.groups, 1

    def of_chunks(self, inputs: Tensor) -> Tensor:
        return self.fp32(inputs, self.chunks, self.channels)

    def of_groups(self, inputs: Tensor) -> Tensor:
        return self.fp32(inputs, self.groups)

    def fp32(self, inputs: Tensor, *sizes: int) -> Tensor:
        """Room for a pair of numbers of each sample."""
        return torch.empty(2, len(inputs), *sizes, device=inputs.device, dtype=torch.float32)


@functools.cache
def _plan(pixels: int, channels: int, groups: int) -> _Plan:
    group_size = channels // groups
    if triton.next_power_of_2(group_size) > _SUMS:
        raise ValueError(f"a group has {group_size} channels; the kernels take at most {_SUMS}: use more groups")
    # the largest power of two that divides the channels leaves none over
    width = max(16, min(_BLOCK_CHANNELS, channels & -channels))
    height = _BLOCK // width
    rows = height * triton.cdiv(pixels, height * min(_CHUNKS, _SUMS // triton.next_power_of_2(group_size)))
    part, chunks = _BLOCKS * height, triton.cdiv(pixels, rows)
    parts = triton.cdiv(pixels, part)
    if pixels * channels > _LARGEST_SAMPLE or parts > _LARGEST_GRID:
        raise ValueError(
            f"a sample has {pixels} pixels of {channels} channels; the kernels take at most {_LARGEST_SAMPLE} elements "
            f"and {_LARGEST_GRID * part} pixels"
        )
    group_blocks = triton.next_power_of_2(chunks), triton.next_power_of_2(group_size)
    return _Plan(pixels, channels, groups, group_size, (height, width), rows, chunks, part, parts, group_blocks)


def _channels_last(values: Tensor) -> Tensor:
    """[B, C, …] whose memory is that of [B, …, C]."""
    last = values.movedim(1, -1)
    return values if last.is_contiguous() else last.contiguous().movedim(-1, 1)
