"""Triton kernels of the learner: log-prob, ratio, clip and the gradient of the model output.

A small sample is one program's: it computes the log-prob, clips and writes the gradient in one pass. A larger one takes
two stages, partial sums and a finalize in fixed order, and the gradient is recomputed: nothing sample-sized is saved.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hrf_kernels.formulas import gaussian_mean, load_coefficients, load_output, log_prob_of, surrogate_terms
from hrf_kernels.launch import ROWS, UNALIGNED

_ROWS = tl.constexpr(ROWS)
_COLUMNS = tl.constexpr(32)


@triton.jit
def _kl_of(shift_sum, size, std):
    """KL of two Gaussians of equal std, mean over the sample: (mean − reference mean)²/(2·std²)."""
    return 0.5 * tl.div_rn(tl.div_rn(shift_sum, tl.full([], size, tl.float32)), std * std)


@triton.jit
def _write_surrogate(
    log_prob, kl, index, mask, old_log_prob, advantage, clip_range, advantage_clip, loss_weight, kl_weight,
    loss_out, log_prob_out, ratio_out, outside_out, clipped_out, approx_kl_out, kl_out, slope_out,
):  # fmt: skip
    """Loss and statistics of samples `index`, a block or one; returns ∂loss/∂log_prob."""
    loss, slope, ratio, outside, clipped, approx_kl = surrogate_terms(
        log_prob, old_log_prob, advantage, clip_range, advantage_clip
    )
    slope = loss_weight * slope
    tl.store(loss_out + index, loss_weight * (loss + kl_weight * kl), mask=mask)
    tl.store(log_prob_out + index, log_prob, mask=mask)
    tl.store(ratio_out + index, ratio, mask=mask)
    tl.store(outside_out + index, outside, mask=mask)
    tl.store(clipped_out + index, clipped, mask=mask)
    tl.store(approx_kl_out + index, approx_kl, mask=mask)
    tl.store(kl_out + index, kl, mask=mask)
    tl.store(slope_out + index, slope, mask=mask)
    return slope


@triton.jit
def _write_gradient(gradient, unconditional_gradient, guidance_scale, offsets, mask, value):
    """∂/∂model_output, shared between the two outputs of classifier-free guidance."""
    if unconditional_gradient is not None:
        kind = unconditional_gradient.dtype.element_ty
        tl.store(unconditional_gradient + offsets, ((1.0 - guidance_scale) * value).to(kind), mask=mask)
        value = guidance_scale * value
    tl.store(gradient + offsets, value.to(gradient.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def sums_kernel(
    model_output, unconditional, reference, latents, next_latents, sums, shift_sums, log_prob,
    x0_latents, x0_output, mean_x0, mean_latents, mean_output, std, x0_clip, guidance_scale, size,
    PER_SAMPLE: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """Sums over a chunk of (next − mean)² and (mean − reference mean)².  See reference.gaussian_log_prob.

    Grid (B, chunks). With one iteration a program holds its whole sample and writes log_prob, else sums [B, chunks].
    """
    b = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    a_latents, a_output, b_x0, b_latents, b_output, sigma = load_coefficients(
        x0_latents, x0_output, mean_x0, mean_latents, mean_output, std, b, PER_SAMPLE
    )
    square_sum = tl.zeros([BLOCK], tl.float32)
    shift_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(ITERATIONS):
        element = (chunk * ITERATIONS + i) * BLOCK + tl.arange(0, BLOCK)
        mask = element < size
        offsets = b * size + element
        output = load_output(model_output, unconditional, guidance_scale, offsets, mask)
        now = tl.load(latents + offsets, mask=mask, other=0.0).to(tl.float32)
        mean, _ = gaussian_mean(output, now, a_latents, a_output, b_x0, b_latents, b_output, x0_clip, CLAMP)
        following = tl.load(next_latents + offsets, mask=mask, other=0.0).to(tl.float32)
        difference = following - mean
        square_sum += difference * difference
        if reference is not None:
            anchor = load_output(reference, None, 0.0, offsets, mask)
            target, _ = gaussian_mean(anchor, now, a_latents, a_output, b_x0, b_latents, b_output, x0_clip, CLAMP)
            shift_sum += (mean - target) * (mean - target)
    total = tl.sum(square_sum, axis=0)
    if ITERATIONS == 1:
        tl.store(log_prob + b, log_prob_of(total, size, sigma))
    else:
        tl.store(sums + b * tl.num_programs(1) + chunk, total)
        if reference is not None:
            tl.store(shift_sums + b * tl.num_programs(1) + chunk, tl.sum(shift_sum, axis=0))


@triton.jit
def _row_sums(sums, rows, row_mask, chunks):
    """Sum of each row of [B, chunks], always in the same order."""
    total = tl.zeros([_ROWS, _COLUMNS], tl.float32)
    for first in range(0, chunks, _COLUMNS):
        columns = first + tl.arange(0, _COLUMNS)
        mask = row_mask[:, None] & (columns < chunks)[None, :]
        total += tl.load(sums + rows[:, None] * chunks + columns[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=1)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def finalize_kernel(
    sums, shift_sums, std, old_log_prob, advantages, clip_range, advantage_clip, loss_weight, kl_weight,
    loss, log_prob, ratio, outside, clipped, approx_kl, kl, slope, batch, chunks, size,
    PER_SAMPLE: tl.constexpr, CLIPS_PER_SAMPLE: tl.constexpr, KL_PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """Log-prob of 16 samples from their chunks' sums; with an old one also the clipped surrogate."""
    rows = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    mask = rows < batch
    rows = rows.to(tl.int64)
    sigma = tl.load(std + rows * PER_SAMPLE, mask=mask, other=1.0)
    new_log_prob = log_prob_of(_row_sums(sums, rows, mask, chunks), size, sigma)
    if old_log_prob is None:
        tl.store(log_prob + rows, new_log_prob, mask=mask)
    else:
        distance = tl.zeros([_ROWS], tl.float32)
        if shift_sums is not None:
            distance = _kl_of(_row_sums(shift_sums, rows, mask, chunks), size, sigma)
        if CLIPS_PER_SAMPLE:
            clip_range = tl.load(clip_range + rows, mask=mask, other=0.0)
            advantage_clip = tl.load(advantage_clip + rows, mask=mask, other=0.0)
        if KL_PER_SAMPLE:
            kl_weight = tl.load(kl_weight + rows, mask=mask, other=0.0)
        old = tl.load(old_log_prob + rows, mask=mask, other=0.0)
        advantage = tl.load(advantages + rows, mask=mask, other=0.0)
        _write_surrogate(
            new_log_prob, distance, rows, mask, old, advantage, clip_range, advantage_clip, loss_weight, kl_weight,
            loss, log_prob, ratio, outside, clipped, approx_kl, kl, slope,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def one_program_kernel(
    model_output, unconditional, reference, latents, next_latents, gradient, unconditional_gradient,
    x0_latents, x0_output, mean_x0, mean_latents, mean_output, std, x0_clip, guidance_scale,
    old_log_prob, advantages, clip_range, advantage_clip, loss_weight, kl_weight,
    loss, log_prob, ratio, outside, clipped, approx_kl, kl, slope, size,
    PER_SAMPLE: tl.constexpr, CLAMP: tl.constexpr, CLIPS_PER_SAMPLE: tl.constexpr, KL_PER_SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole of a sample's clipped surrogate, and its gradient if there is room given for one.  Grid (B,)."""
    b = tl.program_id(0).to(tl.int64)
    a_latents, a_output, b_x0, b_latents, b_output, sigma = load_coefficients(
        x0_latents, x0_output, mean_x0, mean_latents, mean_output, std, b, PER_SAMPLE
    )
    element = tl.arange(0, BLOCK)
    mask = element < size
    offsets = b * size + element
    output = load_output(model_output, unconditional, guidance_scale, offsets, mask)
    now = tl.load(latents + offsets, mask=mask, other=0.0).to(tl.float32)
    mean, mean_slope = gaussian_mean(output, now, a_latents, a_output, b_x0, b_latents, b_output, x0_clip, CLAMP)
    following = tl.load(next_latents + offsets, mask=mask, other=0.0).to(tl.float32)
    difference = following - mean
    new_log_prob = log_prob_of(tl.sum(difference * difference, axis=0), size, sigma)
    distance = new_log_prob * 0.0
    if reference is not None:
        anchor = load_output(reference, None, 0.0, offsets, mask)
        target, _ = gaussian_mean(anchor, now, a_latents, a_output, b_x0, b_latents, b_output, x0_clip, CLAMP)
        shift = mean - target
        distance = _kl_of(tl.sum(shift * shift, axis=0), size, sigma)
    if CLIPS_PER_SAMPLE:
        clip_range = tl.load(clip_range + b)
        advantage_clip = tl.load(advantage_clip + b)
    if KL_PER_SAMPLE:
        kl_weight = tl.load(kl_weight + b)
    ratio_slope = _write_surrogate(
        new_log_prob, distance, b, None, tl.load(old_log_prob + b), tl.load(advantages + b), clip_range, advantage_clip,
        loss_weight, kl_weight, loss, log_prob, ratio, outside, clipped, approx_kl, kl, slope,
    )  # fmt: skip
    if gradient is not None:
        value = ratio_slope * difference
        if reference is not None:
            value += loss_weight * kl_weight * shift
        value = value * tl.div_rn(1.0, tl.full([], size, tl.float32) * (sigma * sigma)) * mean_slope
        _write_gradient(gradient, unconditional_gradient, guidance_scale, offsets, mask, value)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def gradient_kernel(
    model_output, unconditional, reference, latents, next_latents, gradient, unconditional_gradient,
    x0_latents, x0_output, mean_x0, mean_latents, mean_output, std, x0_clip, guidance_scale,
    upstream, slope, kl_slope, kl_weights, size,
    PER_SAMPLE: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """∂loss/∂model_output = upstream·(slope·(next − mean) + kl_slope·(mean − reference mean))·∂mean/∂output/(N·std²).

    Grid (B, chunks). Everything is computed again from the inputs.
    """
    b = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    a_latents, a_output, b_x0, b_latents, b_output, sigma = load_coefficients(
        x0_latents, x0_output, mean_x0, mean_latents, mean_output, std, b, PER_SAMPLE
    )
    incoming = tl.load(upstream + b)
    factor = tl.div_rn(incoming, tl.full([], size, tl.float32) * (sigma * sigma))
    log_prob_slope = factor
    if slope is not None:
        log_prob_slope = factor * tl.load(slope + b)
    if kl_weights is not None:
        kl_slope = kl_slope * tl.load(kl_weights + b)
    for i in range(ITERATIONS):
        element = (chunk * ITERATIONS + i) * BLOCK + tl.arange(0, BLOCK)
        mask = element < size
        offsets = b * size + element
        output = load_output(model_output, unconditional, guidance_scale, offsets, mask)
        now = tl.load(latents + offsets, mask=mask, other=0.0).to(tl.float32)
        mean, mean_slope = gaussian_mean(output, now, a_latents, a_output, b_x0, b_latents, b_output, x0_clip, CLAMP)
        following = tl.load(next_latents + offsets, mask=mask, other=0.0).to(tl.float32)
        value = log_prob_slope * (following - mean)
        if reference is not None:
            anchor = load_output(reference, None, 0.0, offsets, mask)
            target, _ = gaussian_mean(anchor, now, a_latents, a_output, b_x0, b_latents, b_output, x0_clip, CLAMP)
            value += factor * kl_slope * (mean - target)
        _write_gradient(gradient, unconditional_gradient, guidance_scale, offsets, mask, value * mean_slope)


@triton.jit
def scale_kernel(gradient, upstream, size, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr):
    """gradient *= upstream, and no access at all where upstream is 1, as it is for a plain sum of the losses."""
    b = tl.program_id(0).to(tl.int64)
    factor = tl.load(upstream + b)
    if factor != 1.0:
        for i in range(ITERATIONS):
            element = (tl.program_id(1) * ITERATIONS + i) * BLOCK + tl.arange(0, BLOCK)
            address = gradient + b * size + element
            value = tl.load(address, mask=element < size, other=0.0).to(tl.float32) * factor
            tl.store(address, value.to(gradient.dtype.element_ty), mask=element < size)
