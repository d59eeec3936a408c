"""The mathematics of the denoising policy in plain torch: the ground truth that every kernel is held to.

All "log-probs" are the mean over C·H·W of the Gaussian log-density. Left out: schedulers (they arrive as
StepCoefficients), windows and advantages (they belong to the trainer), speed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hrf_kernels.checks import check_per_sample, check_samples
from hrf_kernels.coefficients import StepCoefficients
from hrf_kernels.philox import philox_normal

# a ratio beyond e^20 has no use, and exp overflows at 88: past it the ratio and its gradient stay at this value
LOG_RATIO_LIMIT = 20.0


class Surrogate(NamedTuple):
    """Every field is [B], fp32 or bool."""

    loss: Tensor
    """loss_weight·(max(-A·ratio, -A·clip(ratio, 1±clip_range)) + kl_weight·kl); the only field with a gradient."""
    log_prob: Tensor
    ratio: Tensor
    outside: Tensor
    """The ratio is outside 1±clip_range: what is usually reported as the clip fraction."""
    clipped: Tensor
    """The clip decided the loss, so that this sample has no gradient: the signed clip fraction."""
    approx_kl: Tensor
    """k3 estimate (ratio − 1) − log ratio of KL(old ‖ new), never negative (Schulman 2020)."""
    kl: Tensor
    """KL(policy ‖ reference) of the step, mean over C·H·W of (mean − reference mean)²/(2·std²); 0 without one."""


# [B] each, as eager.py and fused.py compute them: the Surrogate, and ∂loss/∂log_prob for the backward pass
RESULTS = dict.fromkeys((*Surrogate._fields, "slope"), torch.float32) | {"outside": torch.bool, "clipped": torch.bool}


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    """A scalar or [B] coefficient, shaped to broadcast over `like` [B, C, H, W]."""
    return value if value.dim() == 0 else value.reshape(-1, *[1] * (like.dim() - 1))


def guided_output(model_output: Tensor, unconditional_output: Tensor | None, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): unconditional + scale·(conditional − unconditional)."""
    if unconditional_output is None:
        return model_output
    return unconditional_output + guidance_scale * (model_output - unconditional_output)


def gaussian_mean(model_output: Tensor, latents: Tensor, coef: StepCoefficients) -> Tensor:
    """Mean of the next latents, [B, C, H, W] fp32 (or wider); the x0 clamp has no gradient outside its range."""
    check_samples(latents, coef, model_output=model_output)
    # float32 accumulation whatever the inputs; float64 inputs stay float64, so that a test can differentiate in it
    dtype = torch.promote_types(torch.promote_types(model_output.dtype, latents.dtype), torch.float32)
    model_output, latents = model_output.to(dtype), latents.to(dtype)

    def factor(value: Tensor) -> Tensor:
        return _per_sample(value, latents)

    x0 = factor(coef.x0_latents) * latents + factor(coef.x0_output) * model_output
    if coef.x0_clip is not None:
        x0 = x0.clamp(-coef.x0_clip, coef.x0_clip)
    mean = factor(coef.mean_x0) * x0 + factor(coef.mean_latents) * latents
    return mean + factor(coef.mean_output) * model_output


def _policy_mean(
    model_output: Tensor,
    latents: Tensor,
    coef: StepCoefficients,
    unconditional_output: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    dtype = torch.promote_types(model_output.dtype, torch.float32)
    unconditional = None if unconditional_output is None else unconditional_output.to(dtype)
    return gaussian_mean(guided_output(model_output.to(dtype), unconditional, guidance_scale), latents, coef)


def _log_density(next_latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    z = (next_latents - mean) / _per_sample(std, mean)
    return -0.5 * z.square().flatten(1).mean(1) - std.log() - 0.5 * math.log(2 * math.pi)


def gaussian_log_prob(
    model_output: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    coef: StepCoefficients,
    *,
    unconditional_output: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """log N(next_latents; mean, std²), averaged over C·H·W; differentiable in both outputs.

    Args:
        model_output, latents, next_latents: [B, C, H, W], any float dtype.
        coef: scalars or [B]; std above 0.
        unconditional_output: [B, C, H, W] for classifier-free guidance with `guidance_scale`.

    Returns:
        [B] fp32: −½·mean z² − log std − ½·log 2π with z = (next_latents − mean)/std.
    """
    check_samples(latents, coef, next_latents=next_latents, unconditional_output=unconditional_output)
    mean = _policy_mean(model_output, latents, coef, unconditional_output, guidance_scale)
    return _log_density(next_latents, mean, coef.std)


def gaussian_step(
    model_output: Tensor,
    latents: Tensor,
    coef: StepCoefficients,
    *,
    seed: int,
    sample_id: Tensor,
    step: int,
    unconditional_output: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Draw the next latents, with their log-prob.

    Args:
        model_output, latents: [B, C, H, W].
        coef: scalars or [B]; where std is 0 the next latents are the mean and the log-prob is not finite.
        seed: key of the noise; sample_id: [B] int64, the counter that makes a sample's noise its own, however a batch
            is split; step: the denoising step.

    Returns:
        next_latents [B, C, H, W] in the dtype of `latents`, and log_prob [B] fp32.
    """
    check_per_sample(latents, sample_id=sample_id)
    check_samples(latents, coef, unconditional_output=unconditional_output)
    mean = _policy_mean(model_output, latents, coef, unconditional_output, guidance_scale)
    noise = philox_normal(tuple(mean.shape[1:]), seed=seed, sample_id=sample_id, step=step)
    next_latents = (mean + _per_sample(coef.std, mean) * noise).to(latents.dtype)
    # of latents as stored: the same rounding as a replay sees, so that the ratio of an on-policy replay is exactly 1
    return next_latents, _log_density(next_latents, mean, coef.std)


def clipped_surrogate(
    model_output: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    coef: StepCoefficients,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_range: float | Tensor,
    *,
    advantage_clip: float | Tensor = math.inf,
    window_scale: float | Tensor = 1.0,
    loss_weight: float = 1.0,
    unconditional_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    reference_output: Tensor | None = None,
    kl_weight: float | Tensor = 0.0,
) -> Surrogate:
    """PPO's clipped loss of one denoising step per sample (DDPO, arXiv 2305.13301, eq. 5; HRF, arXiv 2410.08315).

    Args:
        model_output, latents, next_latents: [B, C, H, W]; the gradient flows into `model_output` (and
            `unconditional_output`, [B, C, H, W], with classifier-free guidance).
        coef: scalars or [B].
        old_log_prob, advantages: [B] fp32.
        clip_range: half-width ε of the ratio's range 1±ε; a number or [B].
        advantage_clip: bound on |advantage|; a number or [B].
        window_scale: factor of both clips, HRF's (T − start)/T; a number or [B].
        loss_weight: factor of the loss, for what the caller would divide by.
        reference_output: [B, C, H, W] of a frozen model at the same latents; adds kl_weight·KL(policy ‖ reference).
        kl_weight: a number or [B]; 2·std² of a step gives the mean of (mean − reference mean)² without 1/(2·std²).
    """
    check_per_sample(latents, old_log_prob=old_log_prob, advantages=advantages)
    check_samples(latents, coef, unconditional_output=unconditional_output, reference_output=reference_output)
    check_samples(latents, coef, next_latents=next_latents)
    check_per_sample(latents, **({"kl_weight": kl_weight} if isinstance(kl_weight, Tensor) else {}))
    mean = _policy_mean(model_output, latents, coef, unconditional_output, guidance_scale)
    log_prob = _log_density(next_latents, mean, coef.std)
    clip_range, bound = clips(latents, clip_range, advantage_clip, window_scale)
    advantages = advantages.clamp(-bound, bound)
    log_ratio = log_prob - old_log_prob
    # an infinity becomes NaN here, and no clip hides it
    log_ratio = log_ratio + (log_ratio - log_ratio).detach()
    # beyond the limit the value stays and the gradient flows on
    log_ratio = log_ratio - (log_ratio - LOG_RATIO_LIMIT).relu().detach()
    ratio = log_ratio.exp()
    low, high = (1 - clip_range).to(ratio), (1 + clip_range).to(ratio)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    kl = torch.zeros_like(log_prob)
    if reference_output is not None:
        shift = (mean - gaussian_mean(reference_output.detach(), latents, coef)) / _per_sample(coef.std, mean)
        kl = 0.5 * shift.square().flatten(1).mean(1)
    with torch.no_grad():
        above, below = ratio > high, ratio < low
        clipped = ((advantages > 0) & above) | ((advantages < 0) & below)
        approx_kl = log_ratio.expm1() - log_ratio
    total = loss_weight * (loss + kl_weight * kl)
    return Surrogate(total, log_prob.detach(), ratio.detach(), above | below, clipped, approx_kl, kl.detach())


def clips(
    latents: Tensor, clip_range: float | Tensor, advantage_clip: float | Tensor, window_scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Both clips times the window's scale, fp32 scalars or [B]."""
    named = {"clip_range": clip_range, "advantage_clip": advantage_clip, "window_scale": window_scale}
    check_per_sample(latents, **{name: value for name, value in named.items() if isinstance(value, Tensor)})
    low, high = (value * window_scale for value in (clip_range, advantage_clip))
    return _number(low, latents), _number(high, latents)


def _number(value: float | Tensor, like: Tensor) -> Tensor:
    # a fill, which a GPU does by itself: to copy a Python number there waits for it
    return value.float() if isinstance(value, Tensor) else like.new_full((), value, dtype=torch.float32)
