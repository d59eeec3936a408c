"""Triton kernels of a group norm over channels-last memory, [B, pixels, channels], with or without SiLU.

Sums go in two stages and in fixed order: of each channel over a chunk of pixels, then over the chunks and the channels
of a group. The plan depends on a sample's shape alone, so that a sample has the same bits in any batch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _block(sample, chunk, rows, first, pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(offsets [BLOCK_P, BLOCK_C] of pixels `first` on of a chunk, which of them exist)."""
    pixel = chunk * rows + first + tl.arange(0, BLOCK_P)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    offsets = sample * pixels * channels + pixel[:, None] * channels + channel[None, :]
    return offsets, (pixel < pixels)[:, None] & (channel < channels)[None, :]


@triton.jit
def _activation(scaled, SILU: tl.constexpr):
    """SiLU(z) = z·sigmoid(z), or z."""
    return scaled / (1.0 + tl.exp(-scaled)) if SILU else scaled


@triton.jit
def _through_activation(gradient, scaled, SILU: tl.constexpr):
    """The gradient of z: σ(z)·(1 + z·(1 − σ(z))) is the slope of SiLU."""
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-scaled))
        gradient *= sigmoid * (1.0 + scaled * (1.0 - sigmoid))
    return gradient


@triton.jit
def _of_groups(pairs, sample, channels, group_size, BLOCK_C: tl.constexpr):
    """The two numbers of each channel's group in [2, B, groups], [1, BLOCK_C] each."""
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    groups = channels // group_size
    index = sample * groups + channel // group_size
    first = tl.load(pairs + index, mask=channel < channels, other=0.0)
    second = tl.load(pairs + tl.num_programs(0) * groups + index, mask=channel < channels, other=0.0)
    return first[None, :], second[None, :]


@triton.jit
def _of_channels(weight, bias, channels, BLOCK_C: tl.constexpr):
    """Weight and bias of each channel, [1, BLOCK_C]."""
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    gain = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    return gain[None, :], offset[None, :]


@triton.jit
def _of_group(sample, group, channels, group_size, chunks, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr):
    """(channels of a group [BLOCK_G], chunks [BLOCK_S], offsets of both in [B, chunks, channels], which exist)."""
    chunk, member = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_G)
    channel = group * group_size + member
    mask = (chunk < chunks)[:, None] & (member < group_size)[None, :]
    return channel, chunk, (sample * chunks + chunk[:, None]) * channels + channel[None, :], mask


@triton.jit
def _store_pair(pairs, index, size, first, second, mask):
    """Two numbers at `index` of [2, size]."""
    tl.store(pairs + index, first, mask=mask)
    tl.store(pairs + size + index, second, mask=mask)


@triton.jit
def moments_kernel(
    inputs, moments, pixels, channels, rows, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Mean of each channel over a chunk of `rows` pixels, and the sum of squares about it, [2, B, chunks, channels].

    Grid (B, chunks, blocks of channels). Numbers are taken less the chunk's first: squares of large ones would cancel.
    """
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    start = (sample * pixels + chunk * rows) * channels
    # in each row of the block: a vector would have to be laid out as its rows are
    firsts = start + tl.zeros([BLOCK_P, BLOCK_C], tl.int32) + channel[None, :]
    shift = tl.load(inputs + firsts, mask=exists[None, :], other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, rows, BLOCK_P):
        offsets, mask = _block(sample, chunk, rows, first, pixels, channels, BLOCK_P, BLOCK_C)
        values = tl.load(inputs + offsets, mask=mask, other=0.0).to(tl.float32) - shift
        values = tl.where(mask, values, 0.0)
        total += values
        square += values * values
    count = tl.minimum(rows, pixels - chunk * rows).to(tl.float32)
    totals = tl.sum(total, 0)
    moved = tl.div_rn(totals, tl.zeros([BLOCK_C], tl.float32) + count)
    row = (sample * tl.num_programs(1) + chunk) * channels + channel
    size = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * channels
    _store_pair(moments, row, size, tl.max(shift, 0) + moved, tl.sum(square, 0) - totals * moved, exists)


@triton.jit
def group_moments_kernel(
    moments, statistics, pixels, channels, group_size, rows, chunks, eps,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Mean and 1/sqrt(variance + eps) of each group [2, B, groups], of chunks (Chan et al. 1979). Grid (B, groups)."""
    sample, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, chunk, offsets, mask = _of_group(sample, group, channels, group_size, chunks, BLOCK_S, BLOCK_G)
    counts = tl.where(mask, tl.minimum(rows, pixels - chunk * rows).to(tl.float32)[:, None], 0.0)
    each = tl.load(moments + offsets, mask=mask, other=0.0)
    size = tl.zeros([], tl.float32) + pixels * group_size
    average = tl.div_rn(tl.sum(tl.sum(counts * each, 1), 0), size)
    apart = each - average
    half = tl.num_programs(0).to(tl.int64) * chunks * channels
    squares = tl.load(moments + half + offsets, mask=mask, other=0.0) + counts * apart * apart
    variance = tl.div_rn(tl.sum(tl.sum(squares, 1), 0), size)
    rstd = tl.div_rn(tl.full([], 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    groups = tl.num_programs(1)
    _store_pair(statistics, sample * groups + group, tl.num_programs(0) * groups, average, rstd, None)


@triton.jit
def normalise_kernel(
    inputs, output, statistics, weight, bias, pixels, channels, group_size, rows,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """activation((x − mean)·rstd·weight + bias). Grid (B, chunks, blocks of channels)."""
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    centre, scale = _of_groups(statistics, sample, channels, group_size, BLOCK_C)
    gain, offset = _of_channels(weight, bias, channels, BLOCK_C)
    for first in range(0, rows, BLOCK_P):
        offsets, mask = _block(sample, chunk, rows, first, pixels, channels, BLOCK_P, BLOCK_C)
        values = tl.load(inputs + offsets, mask=mask, other=0.0).to(tl.float32)
        result = _activation((values - centre) * scale * gain + offset, SILU)
        tl.store(output + offsets, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def gradient_sums_kernel(
    inputs, gradient, sums, statistics, weight, bias, pixels, channels, group_size, rows,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of each channel over a chunk, [2, B, chunks, channels]: of the gradient dz, and of dz·x̂. Grid as above."""
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    centre, scale = _of_groups(statistics, sample, channels, group_size, BLOCK_C)
    gain, offset = _of_channels(weight, bias, channels, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    product = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, rows, BLOCK_P):
        offsets, mask = _block(sample, chunk, rows, first, pixels, channels, BLOCK_P, BLOCK_C)
        normal = (tl.load(inputs + offsets, mask=mask, other=0.0).to(tl.float32) - centre) * scale
        upstream = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32)
        upstream = _through_activation(upstream, normal * gain + offset, SILU)
        total += upstream
        product += upstream * normal
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = (sample * tl.num_programs(1) + chunk) * channels + channel
    size = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * channels
    _store_pair(sums, row, size, tl.sum(total, 0), tl.sum(product, 0), channel < channels)


@triton.jit
def group_sums_kernel(
    sums, weight, of_channels, of_groups, channels, group_size, chunks, size,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Over all chunks Σdz and Σdz·x̂ of each channel [2, B, channels], Σdz·w and Σdz·w·x̂ by size [2, B, groups]."""
    sample, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel, _, offsets, mask = _of_group(sample, group, channels, group_size, chunks, BLOCK_S, BLOCK_G)
    inside = channel < (group + 1) * group_size
    total = tl.sum(tl.load(sums + offsets, mask=mask, other=0.0), 0)
    batch = tl.num_programs(0).to(tl.int64)
    product = tl.sum(tl.load(sums + batch * chunks * channels + offsets, mask=mask, other=0.0), 0)
    _store_pair(of_channels, sample * channels + channel, batch * channels, total, product, inside)
    gain = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    count = tl.zeros([], tl.float32) + size
    along, across = tl.div_rn(tl.sum(total * gain, 0), count), tl.div_rn(tl.sum(product * gain, 0), count)
    groups = tl.num_programs(1)
    _store_pair(of_groups, sample * groups + group, batch * groups, along, across, None)


@triton.jit
def input_gradient_kernel(
    inputs, gradient, result, statistics, weight, bias, of_groups, pixels, channels, group_size, rows,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """rstd·(dz·weight − mean of dz·weight − x̂·mean of dz·weight·x̂). Grid (B, chunks, blocks of channels)."""
    sample, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    centre, scale = _of_groups(statistics, sample, channels, group_size, BLOCK_C)
    gain, offset = _of_channels(weight, bias, channels, BLOCK_C)
    along, across = _of_groups(of_groups, sample, channels, group_size, BLOCK_C)
    for first in range(0, rows, BLOCK_P):
        offsets, mask = _block(sample, chunk, rows, first, pixels, channels, BLOCK_P, BLOCK_C)
        normal = (tl.load(inputs + offsets, mask=mask, other=0.0).to(tl.float32) - centre) * scale
        upstream = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32)
        upstream = _through_activation(upstream, normal * gain + offset, SILU) * gain
        tl.store(
            result + offsets, ((upstream - along - normal * across) * scale).to(result.dtype.element_ty), mask=mask
        )
