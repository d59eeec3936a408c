"""Triton kernel of the sampler: mean, noise, next latents and their log-prob in one pass over the sample."""

from __future__ import annotations

import triton
import triton.language as tl

from hrf_kernels.formulas import gaussian_mean, load_coefficients, load_output, log_prob_of, normal_noise
from hrf_kernels.launch import UNALIGNED


@triton.jit(do_not_specialize=["key_low", "key_high", "step"], do_not_specialize_on_alignment=UNALIGNED)
def step_kernel(
    model_output, unconditional, latents, next_latents, sample_id, sums, log_prob,
    x0_latents, x0_output, mean_x0, mean_latents, mean_output, std, x0_clip, guidance_scale,
    key_low, key_high, step, size,
    PER_SAMPLE: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """next = mean + std·noise; sum over the chunk of (next − mean)², of next as stored.  See reference.gaussian_step.

    Grid (B, chunks). With one iteration a program holds its whole sample and writes log_prob, else sums [B, chunks].
    """
    # int64: batch * size passes 2^31 at 256x256 pixels and B = 10 923
    b = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    a_latents, a_output, b_x0, b_latents, b_output, sigma = load_coefficients(
        x0_latents, x0_output, mean_x0, mean_latents, mean_output, std, b, PER_SAMPLE
    )
    sample = tl.load(sample_id + b)
    square_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(ITERATIONS):
        first = (chunk * ITERATIONS + i) * BLOCK
        element = first + tl.arange(0, BLOCK)
        mask = element < size
        offsets = b * size + element
        output = load_output(model_output, unconditional, guidance_scale, offsets, mask)
        now = tl.load(latents + offsets, mask=mask, other=0.0).to(tl.float32)
        mean, _ = gaussian_mean(
            output, now, a_latents, a_output, b_x0, b_latents, b_output, x0_clip, CLAMP
        )  # fmt: skip
        quads = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        noise = normal_noise(quads, step, sample, key_low, key_high, BLOCK)
        following = (mean + sigma * noise).to(next_latents.dtype.element_ty)
        tl.store(next_latents + offsets, following, mask=mask)
        difference = tl.where(mask, following.to(tl.float32) - mean, 0.0)
        square_sum += difference * difference
    total = tl.sum(square_sum, axis=0)
    if ITERATIONS == 1:
        tl.store(log_prob + b, log_prob_of(total, size, sigma))
    else:
        tl.store(sums + b * tl.num_programs(1) + chunk, total)
