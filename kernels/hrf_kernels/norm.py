"""A group norm over channels-last memory, with SiLU behind it if asked for; the Triton kernels' launches.

torch's own group norm on CUDA makes its input contiguous, which turns the order that convolutions prefer around and
back at every norm. Here nothing is copied, and of a norm and its SiLU only the norm's input is kept for the backward.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

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
# of a sample: a group's program reads the sums of all
_CHUNKS = 64
# blocks of an elementwise program
_BLOCKS = 4
# offsets in a sample have 32 bits
_LARGEST_SAMPLE = 2**31 - 2**16


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
        ValueError: channels that are no multiple of groups, too large a sample, or no GPU for Triton.
    """
    channels = inputs.shape[1]
    if groups < 1 or channels % groups or weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"{channels} channels, {groups} groups, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not "
            "fit: the channels must be a multiple of the groups, weight and bias [channels]"
        )
    if inputs[:1].numel() > _LARGEST_SAMPLE:
        raise ValueError(f"a sample has {inputs[:1].numel()} elements; the kernel takes at most {_LARGEST_SAMPLE}")
    if inputs.device.type != "cuda":
        check_device(inputs.device)
    if not inputs.numel():
        return torch.empty_like(inputs, dtype=dtype)
    result: Tensor = _GroupNorm.apply(inputs, weight, bias, groups, eps, silu, dtype or inputs.dtype)
    return result


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, dtype: torch.dtype
    ) -> Tensor:
        values = _channels_last(inputs)
        plan = _plan(math.prod(values.shape[1:-1]), values.shape[-1], groups)
        start = partial(_launch, plan, (values.dtype, dtype, weight.dtype, eps, silu), values)
        moments, statistics = plan.of_chunks(values), plan.of_groups(values)
        start(moments_kernel, plan.chunks, (values, moments, *plan.sizes[:2], plan.rows), plan.blocks)
        start(
            group_moments_kernel, None,
            (moments, statistics, *plan.sizes, plan.rows, plan.chunks, eps), plan.group_blocks,
        )  # fmt: skip
        output = torch.empty_like(values, dtype=dtype)
        start(
            normalise_kernel, plan.parts,
            (values, output, statistics, weight, bias, *plan.sizes, plan.part, silu), plan.blocks,
        )  # fmt: skip
        ctx.save_for_backward(values, weight, bias, statistics)
        ctx.plan, ctx.silu = plan, silu
        return output.movedim(-1, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, bias, statistics = ctx.saved_tensors
        plan, gradient = ctx.plan, _channels_last(gradients[0])
        start = partial(_launch, plan, (values.dtype, gradient.dtype, weight.dtype, ctx.silu), values)
        sums = plan.of_chunks(values)
        start(
            gradient_sums_kernel, plan.chunks,
            (values, gradient, sums, statistics, weight, bias, *plan.sizes, plan.rows, ctx.silu), plan.blocks,
        )  # fmt: skip
        of_channels, of_groups = (
            torch.empty(2, len(values), plan.channels, device=values.device),
            plan.of_groups(values),
        )
        start(
            group_sums_kernel, None,
            (sums, weight, of_channels, of_groups, *plan.sizes[1:], plan.chunks, plan.pixels * plan.group_size),
            plan.group_blocks,
        )  # fmt: skip
        result = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            result = torch.empty_like(values)
            start(
                input_gradient_kernel, plan.parts,
                (values, gradient, result, statistics, weight, bias, of_groups, *plan.sizes, plan.part, ctx.silu),
                plan.blocks,
            )  # fmt: skip
            result = result.movedim(-1, 1)
        if any(ctx.needs_input_grad[1:3]):
            of_bias, of_weight = of_channels.sum(1).to(weight.dtype).unbind()
        return result, of_weight, of_bias, None, None, None, None


def _launch(
    plan: _Plan, kind: tuple[Any, ...], values: Tensor, kernel: Any, chunks: int | None, arguments: Any, blocks: Any
) -> None:
    """A kernel over (samples, chunks, blocks of channels), or (samples, groups) without chunks."""
    batch = len(values)
    grid = (batch, plan.groups, 1) if chunks is None else (batch, chunks, plan.columns)
    threads = _THREADS if chunks else 128
    relaunch((kernel.__name__, plan, *kind), kernel, grid, values.device, *arguments, *blocks, threads=threads)


@dataclass(frozen=True, eq=False)
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

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.pixels, self.channels, self.group_size

    @property
    def columns(self) -> int:
        return triton.cdiv(self.channels, self.blocks[1])

    @property
    def group_blocks(self) -> tuple[int, int]:
        return triton.next_power_of_2(self.chunks), triton.next_power_of_2(self.group_size)

    def of_chunks(self, values: Tensor) -> Tensor:
        return torch.empty(2, len(values), self.chunks, self.channels, device=values.device)

    def of_groups(self, values: Tensor) -> Tensor:
        return torch.empty(2, len(values), self.groups, device=values.device)


@functools.cache
def _plan(pixels: int, channels: int, groups: int) -> _Plan:
    # the largest power of two that divides the channels leaves none over
    width = max(16, min(_BLOCK_CHANNELS, channels & -channels))
    height = _BLOCK // width
    rows = height * triton.cdiv(triton.cdiv(pixels, _CHUNKS), height)
    part = _BLOCKS * height
    cut = rows, triton.cdiv(pixels, rows), part, triton.cdiv(pixels, part)
    return _Plan(pixels, channels, groups, channels // groups, (height, width), *cut)


def _channels_last(values: Tensor) -> Tensor:
    """[B, …, C], contiguous."""
    return values.movedim(1, -1).contiguous()
