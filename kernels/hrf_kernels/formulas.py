"""Formulas that the Triton kernels share, as device functions; each is reference.py's, term by term.

Everything is float32. No approximate instruction is in the noise, the log-prob or a ratio near 1, and every launch
forbids fused multiply-add: what the PTX interpreter of the tests computes is what a GPU computes, and a step scored
twice gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# constants of a jitted function must be constexpr; reference.LOG_RATIO_LIMIT
_LOG_RATIO_LIMIT = tl.constexpr(20.0)
_HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)


@triton.jit
def load_coefficients(
    x0_latents, x0_output, mean_x0, mean_latents, mean_output, std, b, PER_SAMPLE: tl.constexpr
):  # fmt: skip
    """The six numbers of sample b's step: from [B] tensors, or from scalars that the batch shares."""
    i = b * PER_SAMPLE
    return (
        tl.load(x0_latents + i),
        tl.load(x0_output + i),
        tl.load(mean_x0 + i),
        tl.load(mean_latents + i),
        tl.load(mean_output + i),
        tl.load(std + i),
    )


@triton.jit
def load_output(conditional, unconditional, guidance_scale, offsets, mask):
    """The model's output as float32, with classifier-free guidance if there is an unconditional one."""
    output = tl.load(conditional + offsets, mask=mask, other=0.0).to(tl.float32)
    if unconditional is not None:
        base = tl.load(unconditional + offsets, mask=mask, other=0.0).to(tl.float32)
        output = base + guidance_scale * (output - base)
    return output


@triton.jit
def clamp(value, low, high):
    """NaN stays NaN; tl.clamp would turn it into a bound."""
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def gaussian_mean(
    output, latents, x0_latents, x0_output, mean_x0, mean_latents, mean_output, x0_clip, CLAMP: tl.constexpr
):  # fmt: skip
    """(mean, ∂mean/∂output): the affine step, its x0 clamped to ±x0_clip."""
    x0 = x0_latents * latents + x0_output * output
    slope = mean_output + mean_x0 * x0_output
    if CLAMP:
        slope = tl.where((x0 >= -x0_clip) & (x0 <= x0_clip), slope, mean_output)
        x0 = clamp(x0, -x0_clip, x0_clip)
    # not folded into two coefficients: rounding those shifts every element the same way, by 4x the error of this
    mean = mean_x0 * x0 + mean_latents * latents + mean_output * output
    return mean, slope


@triton.jit
def log_prob_of(square_sum, size, std):
    """−½·mean z² − log std − ½·log 2π from the sum of (next − mean)²; NaN where there is no such density."""
    mean_square = tl.div_rn(square_sum, tl.full([], size, tl.float32))
    log_prob = -0.5 * tl.div_rn(mean_square, std * std) - natural_log(std) - _HALF_LOG_TWO_PI
    return tl.where((std > 0.0) & (std < float("inf")), log_prob, float("nan"))


@triton.jit
def surrogate_terms(log_prob, old_log_prob, advantage, clip_range, advantage_clip):
    """(loss, ∂loss/∂log_prob, ratio, outside, clipped, approx_kl) of one sample; see reference.clipped_surrogate."""
    advantage = clamp(advantage, -advantage_clip, advantage_clip)
    x = log_prob - old_log_prob
    # an infinity becomes NaN here, and no clip hides it
    x = x + (x - x)
    x = tl.where(x > _LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT, x)
    # e^x - 1 - x by its series near 0, where exp would leave nothing of it
    series = 1.0 / 5040 + x * (1.0 / 40320 + x * (1.0 / 362880 + x * (1.0 / 3628800)))
    series = 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * series))))
    near = (x > -0.5) & (x < 0.5)
    power = tl.exp(x)
    approx_kl = tl.where(near, x * x * series, power - 1.0 - x)
    ratio = tl.where(near, 1.0 + (x + x * x * series), power)
    low, high = 1.0 - clip_range, 1.0 + clip_range
    above, below = ratio > high, ratio < low
    clipped = ((advantage > 0) & above) | ((advantage < 0) & below)
    loss = -advantage * tl.where(clipped, tl.where(above, high, low), ratio)
    slope = tl.where(clipped, 0.0, -advantage * ratio)
    return loss, slope, ratio, above | below, clipped, approx_kl


@triton.jit
def natural_log(x):
    """log x to 1 ulp for normal x > 0: exponent and a polynomial of the mantissa (Cephes logf)."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    # mantissa in [sqrt 1/2, sqrt 2)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = ((7.0376836292e-2 * f - 1.1514610310e-1) * f + 1.1676998740e-1) * f - 1.2420140846e-1
    p = ((p * f + 1.4249322787e-1) * f - 1.6668057665e-1) * f + 2.0000714765e-1
    p = (p * f - 2.4999993993e-1) * f + 3.3333331174e-1
    e = exponent.to(tl.float32)
    return e * 0.693359375 + (f + (f * f * (f * p - 0.5) + e * -2.12194440e-4))


@triton.jit
def sin_cos_turns(u):
    """(sin 2πu, cos 2πu) for u in [0, 1): reduced exactly to an eighth of a turn, then polynomials (Cephes)."""
    quarter = (u * 4.0 + 0.5).to(tl.int32)
    r = (u - quarter.to(tl.float32) * 0.25) * 6.283185307179586
    r2 = r * r
    s = r + r * r2 * ((-1.9515295891e-4 * r2 + 8.3321608736e-3) * r2 - 1.6666654611e-1)
    c = 1.0 - 0.5 * r2 + r2 * r2 * ((2.443315711809948e-5 * r2 - 1.388731625493765e-3) * r2 + 4.166664568298827e-2)
    swap = (quarter & 1) == 1
    sine, cosine = tl.where(swap, c, s), tl.where(swap, s, c)
    sine = tl.where((quarter & 2) == 2, -sine, sine)
    cosine = tl.where(((quarter + 1) & 2) == 2, -cosine, cosine)
    return sine, cosine


@triton.jit
def normal_noise(quads, step, sample_id, key_low, key_high, BLOCK: tl.constexpr):
    """[BLOCK] normals of the Philox counters (quad, step, sample_id, 0), four to a counter; see philox.py."""
    zero = quads * 0
    w0, w1, w2, w3 = tl.philox_impl(
        quads, zero + step.to(tl.uint32), zero + sample_id.to(tl.uint32), zero,
        key_low.to(tl.uint32), key_high.to(tl.uint32),
    )  # fmt: skip
    scale = 1.0 / (1 << 24)
    radius0 = tl.sqrt_rn(-2.0 * natural_log(1.0 - (w0 >> 8).to(tl.float32) * scale))
    radius1 = tl.sqrt_rn(-2.0 * natural_log(1.0 - (w2 >> 8).to(tl.float32) * scale))
    sine0, cosine0 = sin_cos_turns((w1 >> 8).to(tl.float32) * scale)
    sine1, cosine1 = sin_cos_turns((w3 >> 8).to(tl.float32) * scale)
    # element 4·quad + 2·i + j is entry [quad, i, j]
    first = tl.join(radius0 * cosine0, radius1 * cosine1)
    second = tl.join(radius0 * sine0, radius1 * sine1)
    return tl.reshape(tl.join(first, second), [BLOCK])
