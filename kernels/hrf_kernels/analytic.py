"""The eager implementation: plain torch with its gradient written out, for CPUs and for machines without Triton.

Temporaries are updated in place, a block of samples that fits the cache at a time, and the gradient is made in the
forward pass from the same difference: autograd sees one operation. The same functions as triton_backend.py; arguments
are what reference.py says, positional and checked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hrf_kernels.philox import philox_normal
from hrf_kernels.reference import LOG_RATIO_LIMIT

# elements worked on at a time (1 MB in float32)
_BLOCK = 2**18
# sums are taken in rows of at most this many elements, so that float32 keeps its digits
_ROW = 4096


class _Scores(NamedTuple):
    """What one pass over the samples leaves behind."""

    mean_square: Tensor
    """[B]: mean of (next − mean)² over a sample."""
    mean_square_shift: Tensor
    """[B]: mean of (mean − reference mean)², 0 without a reference."""
    sloped: Tensor | None
    """[B, ...]: (next − mean)·∂mean/∂output, where a gradient is wanted."""
    sloped_shift: Tensor | None
    """[B, ...]: (mean − reference mean)·∂mean/∂output, likewise."""


def saves_gradient(size: int) -> bool:
    """The surrogate always writes its gradient in the forward pass."""
    return True


def gaussian_step(
    model_output: Tensor,
    unconditional: Tensor | None,
    latents: Tensor,
    coef: list[Tensor],
    x0_clip: float | None,
    guidance_scale: float,
    seed: int,
    sample_id: Tensor,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Next latents like `latents`, and their log-prob [B] fp32."""
    next_latents, log_prob = torch.empty_like(latents), _row(latents)
    stds, factors = coef[5], _expanded(coef, latents, x0_clip is not None)
    for part in _blocks(latents):
        output = _guided(model_output, unconditional, guidance_scale, part)
        now, step_coef = latents[part].float(), _of(factors, part)
        noise = philox_normal(tuple(latents.shape[1:]), seed=seed, sample_id=sample_id[part], step=step)
        mean, _ = _mean(output, now, step_coef, x0_clip)
        next_latents[part] = noise.mul_(step_coef[5]).add_(mean)
        # scored as stored, by the arithmetic of a replay
        mean_square = _mean_square(torch.sub(next_latents[part].float(), mean, out=mean))
        log_prob[part] = _log_prob(mean_square, stds if stds.dim() == 0 else stds[part])
    return next_latents, log_prob


def gaussian_log_prob(
    model_output: Tensor,
    unconditional: Tensor | None,
    latents: Tensor,
    next_latents: Tensor,
    coef: list[Tensor],
    x0_clip: float | None,
    guidance_scale: float,
) -> Tensor:
    """[B] fp32."""
    scores = _score(model_output, unconditional, None, latents, next_latents, coef, x0_clip, guidance_scale, False)
    return _log_prob(scores.mean_square, coef[5])


def clipped_surrogate(
    model_output: Tensor,
    unconditional: Tensor | None,
    reference: Tensor | None,
    latents: Tensor,
    next_latents: Tensor,
    coef: list[Tensor],
    x0_clip: float | None,
    guidance_scale: float,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_range: float | Tensor,
    advantage_clip: float | Tensor,
    loss_weight: float,
    kl_weight: float,
    with_gradient: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """([loss, log_prob, ratio, outside, clipped, approx_kl, kl, slope], gradients if asked for)."""
    std = coef[5]
    scores = _score(
        model_output, unconditional, reference, latents, next_latents, coef, x0_clip, guidance_scale, with_gradient
    )
    log_prob = _log_prob(scores.mean_square, std)
    kl = scores.mean_square_shift
    if reference is not None:
        kl = 0.5 * kl / std.square()
    clip = clip_range if isinstance(clip_range, Tensor) else _single(clip_range, std.device)
    bound = advantage_clip if isinstance(advantage_clip, Tensor) else _single(advantage_clip, std.device)
    advantages = advantages.clamp(-bound, bound)
    log_ratio = log_prob - old_log_prob
    # an infinity becomes NaN here, and no clip hides it
    log_ratio = (log_ratio + (log_ratio - log_ratio)).clamp(max=LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    low, high = 1 - clip, 1 + clip
    above, below = ratio > high, ratio < low
    clipped = ((advantages > 0) & above) | ((advantages < 0) & below)
    weight = -advantages
    loss = weight * torch.where(clipped, torch.where(above, high, low), ratio)
    slope = torch.where(clipped, 0.0, weight * ratio)
    if reference is not None:
        loss = loss + kl_weight * kl
    if loss_weight != 1:
        loss, slope = loss_weight * loss, loss_weight * slope
    approx_kl = log_ratio.expm1() - log_ratio
    results = [loss, log_prob, ratio, above | below, clipped, approx_kl, kl, slope]
    kl_slope = slope if reference is None else torch.full_like(slope, loss_weight * kl_weight)
    return results, _gradients(scores, slope, kl_slope, std, model_output, unconditional, guidance_scale)


def output_gradients(
    upstream: Tensor,
    slope: Tensor | None,
    kl_slope: float,
    model_output: Tensor,
    unconditional: Tensor | None,
    reference: Tensor | None,
    latents: Tensor,
    next_latents: Tensor,
    coef: list[Tensor],
    x0_clip: float | None,
    guidance_scale: float,
) -> list[Tensor]:
    """Gradients of the model output(s), like them; `upstream` and `slope` are [B] fp32."""
    scores = _score(model_output, unconditional, reference, latents, next_latents, coef, x0_clip, guidance_scale, True)
    of_log_prob = upstream if slope is None else upstream * slope
    return _gradients(scores, of_log_prob, upstream * kl_slope, coef[5], model_output, unconditional, guidance_scale)


def scale_gradients(gradients: list[Tensor], upstream: Tensor) -> None:
    """Multiply each sample's gradient by upstream [B], in place."""
    if upstream.device.type == "cpu" and bool((upstream == 1).all()):
        return
    for gradient in gradients:
        gradient.mul_(_wide(upstream, gradient))


def _score(
    model_output: Tensor,
    unconditional: Tensor | None,
    reference: Tensor | None,
    latents: Tensor,
    next_latents: Tensor,
    coef: list[Tensor],
    x0_clip: float | None,
    guidance_scale: float,
    with_gradient: bool,
) -> _Scores:
    def room(wanted: bool) -> Tensor | None:
        return torch.empty_like(latents, dtype=torch.float32) if wanted else None

    mean_square, shift_square = _row(latents), latents.new_zeros(len(latents), dtype=torch.float32)
    sloped, sloped_shift = room(with_gradient), room(with_gradient and reference is not None)
    factors = _expanded(coef, latents, x0_clip is not None)
    for part in _blocks(latents):
        now, step_coef = latents[part].float(), _of(factors, part)
        mean, x0 = _mean(_guided(model_output, unconditional, guidance_scale, part), now, step_coef, x0_clip)
        if reference is not None:
            target, _ = _mean(reference[part].float(), now, step_coef, x0_clip)
            shift = torch.sub(mean, target, out=target)
            shift_square[part] = _mean_square(shift)
            if sloped_shift is not None:
                _times_slope(shift, x0, step_coef, x0_clip, out=sloped_shift[part])
        difference = torch.sub(next_latents[part].float(), mean, out=mean)
        mean_square[part] = _mean_square(difference)
        if sloped is not None:
            _times_slope(difference, x0, step_coef, x0_clip, out=sloped[part])
    return _Scores(mean_square, shift_square, sloped, sloped_shift)


def _gradients(
    scores: _Scores,
    slope: Tensor,
    kl_slope: Tensor,
    std: Tensor,
    model_output: Tensor,
    unconditional: Tensor | None,
    guidance_scale: float,
) -> list[Tensor]:
    """∂loss/∂output by the slopes [B] of the log-prob and the KL, in place of the scores' own tensors."""
    gradient = scores.sloped
    if gradient is None:
        return []
    scale = 1 / (gradient[0].numel() * std.square())
    gradient.mul_(_wide(slope * scale, gradient))
    if scores.sloped_shift is not None:
        gradient.addcmul_(scores.sloped_shift, _wide(kl_slope * scale, gradient))
    if unconditional is None:
        return [gradient.to(model_output.dtype)]
    base = (gradient * (1 - guidance_scale)).to(unconditional.dtype)
    return [gradient.mul_(guidance_scale).to(model_output.dtype), base]


def _blocks(latents: Tensor) -> Iterator[slice]:
    """Slices of the batch, each of about _BLOCK elements; a GPU takes the batch whole."""
    batch = len(latents)
    size = max(1, _BLOCK // latents[0].numel()) if latents.device.type == "cpu" else batch
    return (slice(first, min(first + size, batch)) for first in range(0, batch, size))


def _row(latents: Tensor) -> Tensor:
    return torch.empty(len(latents), device=latents.device)


def _expanded(coef: list[Tensor], latents: Tensor, clamped: bool) -> list[Tensor | None]:
    """Coefficients shaped to broadcast over samples, then ∂mean/∂x0·∂x0/∂output and ∂mean/∂output; once for all blocks.

    mean_latents is None where it is zero, as epsilon prediction has it; to look costs a GPU more than to add zeros.
    """
    x0_latents, x0_output, mean_x0, mean_latents, mean_output, std = (_wide(value, latents) for value in coef)
    through = mean_x0 * x0_output
    # under a clamp it is also what shows a latent that is infinite
    absent = not clamped and latents.device.type == "cpu" and not bool(coef[3].count_nonzero())
    return [
        x0_latents, x0_output, mean_x0, None if absent else mean_latents, mean_output, std, through,
        through + mean_output,
    ]  # fmt: skip


def _of(coef: list[Tensor | None], part: slice) -> list[Any]:
    """The coefficients of a block of samples."""
    return [value if value is None or value.dim() == 0 else value[part] for value in coef]


@functools.lru_cache(maxsize=64)
def _single(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=64)
def _beyond(x0_clip: float) -> float:
    """The next float32 above."""
    return float(torch.nextafter(torch.tensor(x0_clip), torch.tensor(math.inf)))


def _wide(value: Tensor, like: Tensor) -> Tensor:
    """A scalar or [B], shaped to broadcast over samples."""
    return value if value.dim() == 0 else value.view(-1, *[1] * (like.dim() - 1))


def _guided(model_output: Tensor, unconditional: Tensor | None, guidance_scale: float, part: slice) -> Tensor:
    output = model_output[part].float()
    if unconditional is None:
        return output
    base = unconditional[part].float()
    return torch.add(base, output - base, alpha=guidance_scale)


def _mean(output: Tensor, latents: Tensor, coef: list[Tensor], x0_clip: float | None) -> tuple[Tensor, Tensor | None]:
    """Mean of the next latents, a new tensor, and x0 before its clamp if it has one."""
    x0_latents, x0_output, mean_x0, mean_latents, mean_output = coef[:5]
    x0 = (latents * x0_latents).addcmul_(output, x0_output)
    clamped = x0 if x0_clip is None else torch.nn.functional.hardtanh(x0, -x0_clip, x0_clip)
    mean = clamped.mul_(mean_x0)
    if mean_latents is not None:
        mean.addcmul_(latents, mean_latents)
    return mean.addcmul_(output, mean_output), None if x0_clip is None else x0


def _times_slope(values: Tensor, x0: Tensor | None, coef: list[Tensor], x0_clip: float | None, *, out: Tensor) -> None:
    """out = values·∂mean/∂output."""
    mean_output, through, slope = coef[4], coef[6], coef[7]
    if x0 is None or x0_clip is None:
        torch.mul(values, slope, out=out)
        return
    # its range is open, and the clamp's is closed: at ±x0_clip there is a gradient
    edge = _beyond(x0_clip)
    through_x0 = torch.ops.aten.hardtanh_backward(values, x0, -edge, edge).mul_(through)
    torch.addcmul(through_x0, values, mean_output, out=out)


def _mean_square(values: Tensor) -> Tensor:
    """[B]: mean of squares over a sample, by dot products of short rows."""
    flat = values.flatten(1)
    size = flat.shape[1]
    row = math.gcd(size, _ROW)
    rows = flat.view(len(flat), -1, row) if row >= 64 else flat[:, None]
    return torch.linalg.vecdot(rows, rows).sum(1) / size


def _log_prob(mean_square: Tensor, std: Tensor) -> Tensor:
    return -0.5 * mean_square / std.square() - std.log() - 0.5 * math.log(2 * math.pi)
