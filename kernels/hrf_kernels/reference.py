"""The mathematics of the denoising policy in plain torch: the ground truth that every kernel is held to.

All "log-probs" are the mean over C·H·W of the Gaussian log-density. Left out: schedulers (they arrive as
StepCoefficients), windows and advantages (they belong to the trainer).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hrf_kernels.coefficients import StepCoefficients
from hrf_kernels.philox import philox_normal


class Surrogate(NamedTuple):
    """What `clipped_surrogate` returns; every field is [B] fp32 or bool."""

    loss: Tensor
    """max(-A·ratio, -A·clip(ratio, 1±clip_range)); the only field with a gradient."""
    log_prob: Tensor
    ratio: Tensor
    outside: Tensor
    """|ratio − 1| > clip_range: what is usually reported as the clip fraction."""
    clipped: Tensor
    """The clip decided the loss, so that this sample has no gradient."""
    approx_kl: Tensor
    """k3 estimate (ratio − 1) − log ratio of KL(old ‖ new), never negative (Schulman 2020)."""


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    """A scalar or [B] coefficient, shaped to broadcast over `like` [B, C, H, W]."""
    return value if value.dim() == 0 else value.reshape(-1, *[1] * (like.dim() - 1))


def _check_per_sample(latents: Tensor, **values: Tensor) -> None:
    """Refuse what would broadcast silently: one number per sample is wanted."""
    for name, value in values.items():
        if value.shape != latents.shape[:1]:
            raise ValueError(f"{name} is {tuple(value.shape)} but the batch is {len(latents)}; pass [{len(latents)}]")


def gaussian_mean(model_output: Tensor, latents: Tensor, coef: StepCoefficients) -> Tensor:
    """Mean of the next latents, [B, C, H, W] fp32 (or wider); the x0 clamp has no gradient outside its range."""
    if model_output.shape != latents.shape:
        raise ValueError(f"model_output is {tuple(model_output.shape)} but latents are {tuple(latents.shape)}")
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


def _log_density(next_latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    z = (next_latents - mean) / _per_sample(std, mean)
    return -0.5 * z.square().flatten(1).mean(1) - std.log() - 0.5 * math.log(2 * math.pi)


def gaussian_log_prob(model_output: Tensor, latents: Tensor, next_latents: Tensor, coef: StepCoefficients) -> Tensor:
    """log N(next_latents; mean, std²), averaged over C·H·W; differentiable in `model_output`.

    Args:
        model_output, latents, next_latents: [B, C, H, W], any float dtype.
        coef: scalars or [B]; std above 0.

    Returns:
        [B] fp32: −½·mean z² − log std − ½·log 2π with z = (next_latents − mean)/std.
    """
    if next_latents.shape != latents.shape:
        raise ValueError(f"next_latents are {tuple(next_latents.shape)} but latents are {tuple(latents.shape)}")
    return _log_density(next_latents, gaussian_mean(model_output, latents, coef), coef.std)


def gaussian_step(
    model_output: Tensor, latents: Tensor, coef: StepCoefficients, *, seed: int, sample_id: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """Draw the next latents and score them.

    Args:
        model_output, latents: [B, C, H, W].
        coef: scalars or [B]; where std is 0 the next latents are the mean and the log-prob is not finite.
        seed: key of the noise; sample_id: [B] int64, the counter that makes a sample's noise its own, however a batch
            is split; step: the denoising step.

    Returns:
        next_latents [B, C, H, W] fp32 and log_prob [B] fp32.
    """
    _check_per_sample(latents, sample_id=sample_id)
    mean = gaussian_mean(model_output, latents, coef)
    noise = philox_normal(tuple(mean.shape[1:]), seed=seed, sample_id=sample_id, step=step)
    next_latents = mean + _per_sample(coef.std, mean) * noise
    # scored as stored: the same rounding as a replay sees, so that the ratio of an on-policy replay is exactly 1
    return next_latents, _log_density(next_latents, mean, coef.std)


def clipped_surrogate(
    model_output: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    coef: StepCoefficients,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_range: float | Tensor,
) -> Surrogate:
    """PPO's clipped loss of one denoising step per sample (DDPO, arXiv 2305.13301, eq. 5; HRF, arXiv 2410.08315).

    Args:
        model_output, latents, next_latents: [B, C, H, W]; the gradient flows into `model_output`.
        coef: scalars or [B].
        old_log_prob, advantages: [B] fp32.
        clip_range: half-width ε of the ratio's range 1±ε; a number or [B].
    """
    _check_per_sample(latents, old_log_prob=old_log_prob, advantages=advantages)
    log_prob = gaussian_log_prob(model_output, latents, next_latents, coef)
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    low, high = (torch.as_tensor(bound).to(ratio) for bound in (1 - clip_range, 1 + clip_range))
    unclipped_loss, clipped_loss = -advantages * ratio, -advantages * ratio.clamp(low, high)
    with torch.no_grad():
        outside = (ratio - 1).abs() > clip_range
        clipped = outside & (clipped_loss > unclipped_loss)
        approx_kl = log_ratio.expm1() - log_ratio
    loss = torch.maximum(unclipped_loss, clipped_loss)
    return Surrogate(loss, log_prob.detach(), ratio.detach(), outside, clipped, approx_kl)
