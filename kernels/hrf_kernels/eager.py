"""The eager implementation: plain torch with its gradient written out, for CPUs and for machines without Triton.

Temporaries are updated in place, a block of samples that fits the cache at a time. The forward pass makes the gradient
from the difference that the log-prob squares, so that autograd sees one operation. fused.py has each of these functions
as kernels; arguments are checked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hrf_kernels.coefficients import ClipInputs, StepInputs
from hrf_kernels.philox import philox_normal
from hrf_kernels.reference import LOG_RATIO_LIMIT

# elements worked on at a time (1 MB in float32)
_BLOCK = 2**18
# sums are taken in rows of at most this many elements, so that float32 keeps its digits
_ROW = 4096


class _Factors(NamedTuple):
    """Coefficients shaped to broadcast over samples, and the slopes that follow from them."""

    x0_latents: Tensor
    x0_output: Tensor
    mean_x0: Tensor
    mean_latents: Tensor | None
    """None where it is zero, as epsilon prediction has it."""
    mean_output: Tensor
    std: Tensor
    through_x0: Tensor
    """∂mean/∂x0·∂x0/∂output."""
    slope: Tensor
    """∂mean/∂output where x0 is not clamped."""
    x0_clip: float | None

    def block(self, part: slice) -> _Factors:
        """The factors of a block of samples."""
        return _Factors._make(value[part] if isinstance(value, Tensor) and value.dim() else value for value in self)


class _Moments(NamedTuple):
    """Sums of one pass over the samples, and its differences where a gradient is wanted."""

    mean_square: Tensor
    """[B]: mean of (next − mean)² over a sample."""
    mean_square_shift: Tensor
    """[B]: mean of (mean − reference mean)², 0 without a reference."""
    sloped: Tensor | None
    """[B, ...]: (next − mean)·∂mean/∂output."""
    sloped_shift: Tensor | None
    """[B, ...]: (mean − reference mean)·∂mean/∂output."""


def saves_gradient(size: int) -> bool:
    """The surrogate always writes its gradient in the forward pass."""
    return True


def gaussian_step(inputs: StepInputs, seed: int, sample_id: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Next latents like `latents`, and their log-prob [B] fp32."""
    latents, factors = inputs.latents, _factors(inputs)
    next_latents, mean_square = torch.empty_like(latents), _row(latents)
    for part in _blocks(latents):
        block = factors.block(part)
        noise = philox_normal(tuple(latents.shape[1:]), seed=seed, sample_id=sample_id[part], step=step)
        mean, _ = _mean(_guided(inputs, part), latents[part].float(), block)
        next_latents[part] = noise.mul_(block.std).add_(mean)
        # of latents as stored, by the arithmetic of a replay
        mean_square[part] = _mean_square(torch.sub(next_latents[part].float(), mean, out=mean))
    return next_latents, _log_prob(mean_square, inputs.coef.std)


def gaussian_log_prob(inputs: StepInputs) -> Tensor:
    """Log-prob of the next latents, [B] fp32."""
    return _log_prob(_moments(inputs, with_gradient=False).mean_square, inputs.coef.std)


def clipped_surrogate(
    inputs: StepInputs, clips: ClipInputs, *, with_gradient: bool
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(reference.RESULTS by name, gradients of the outputs if asked for)."""
    std = inputs.coef.std
    moments = _moments(inputs, with_gradient=with_gradient)
    log_prob = _log_prob(moments.mean_square, std)
    kl = moments.mean_square_shift
    if inputs.reference_output is not None:
        kl = 0.5 * kl / std.square()
    clip_range, bound = (_tensor(value, std.device) for value in (clips.clip_range, clips.advantage_clip))
    advantages = clips.advantages.clamp(-bound, bound)
    log_ratio = log_prob - clips.old_log_prob
    # an infinity becomes NaN here, and no clip hides it
    log_ratio = (log_ratio + (log_ratio - log_ratio)).clamp(max=LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    low, high = 1 - clip_range, 1 + clip_range
    above, below = ratio > high, ratio < low
    clipped = ((advantages > 0) & above) | ((advantages < 0) & below)
    weight = -advantages
    loss = weight * torch.where(clipped, torch.where(above, high, low), ratio)
    slope = torch.where(clipped, 0.0, weight * ratio)
    if inputs.reference_output is not None:
        loss = loss + clips.kl_weight * kl
    if clips.loss_weight != 1:
        loss, slope = clips.loss_weight * loss, clips.loss_weight * slope
    approx_kl = log_ratio.expm1() - log_ratio
    results = {"loss": loss, "log_prob": log_prob, "ratio": ratio, "outside": above | below, "clipped": clipped}
    results |= {"approx_kl": approx_kl, "kl": kl, "slope": slope}
    return results, _gradients(inputs, moments, slope, clips.loss_weight * clips.kl_weight)


def output_gradients(
    inputs: StepInputs, upstream: Tensor, slope: Tensor | None, kl_slope: float, kl_weights: Tensor | None = None
) -> list[Tensor]:
    """Gradients of the model output(s), like them; `upstream`, `slope` and `kl_weights` are [B] fp32."""
    moments = _moments(inputs, with_gradient=True)
    of_kl = upstream * kl_slope if kl_weights is None else upstream * kl_slope * kl_weights
    return _gradients(inputs, moments, upstream if slope is None else upstream * slope, of_kl)


def scale_gradients(gradients: list[Tensor], upstream: Tensor) -> None:
    """Multiply each sample's gradient by upstream [B], in place."""
    if upstream.device.type == "cpu" and bool((upstream == 1).all()):
        return
    for gradient in gradients:
        gradient.mul_(_wide(upstream, gradient))


def _moments(inputs: StepInputs, *, with_gradient: bool) -> _Moments:
    latents, next_latents, reference = inputs.latents, inputs.next_latents, inputs.reference_output
    assert next_latents is not None, "a step without next latents has no log-prob"

    def room(wanted: bool) -> Tensor | None:
        return torch.empty_like(latents, dtype=torch.float32) if wanted else None

    mean_square, shift_square = _row(latents), latents.new_zeros(len(latents), dtype=torch.float32)
    sloped, sloped_shift = room(with_gradient), room(with_gradient and reference is not None)
    factors = _factors(inputs)
    for part in _blocks(latents):
        now, block = latents[part].float(), factors.block(part)
        mean, x0 = _mean(_guided(inputs, part), now, block)
        if reference is not None:
            target, _ = _mean(reference[part].float(), now, block)
            shift = torch.sub(mean, target, out=target)
            shift_square[part] = _mean_square(shift)
            if sloped_shift is not None:
                _times_slope(shift, x0, block, out=sloped_shift[part])
        difference = torch.sub(next_latents[part].float(), mean, out=mean)
        mean_square[part] = _mean_square(difference)
        if sloped is not None:
            _times_slope(difference, x0, block, out=sloped[part])
    return _Moments(mean_square, shift_square, sloped, sloped_shift)


def _gradients(inputs: StepInputs, moments: _Moments, slope: Tensor, kl_slope: float | Tensor) -> list[Tensor]:
    """∂loss/∂output by the slopes of the log-prob and the KL, [B] or a number; overwrites the tensors of `moments`."""
    gradient = moments.sloped
    if gradient is None:
        return []
    scale = 1 / (gradient[0].numel() * inputs.coef.std.square())
    gradient.mul_(_wide(slope * scale, gradient))
    if moments.sloped_shift is not None:
        gradient.addcmul_(moments.sloped_shift, _wide(kl_slope * scale, gradient))
    if inputs.unconditional_output is None:
        return [gradient.to(inputs.model_output.dtype)]
    base = (gradient * (1 - inputs.guidance_scale)).to(inputs.unconditional_output.dtype)
    return [gradient.mul_(inputs.guidance_scale).to(inputs.model_output.dtype), base]


def _blocks(latents: Tensor) -> Iterator[slice]:
    """Slices of the batch, each of about _BLOCK elements; a GPU takes the batch whole."""
    batch = len(latents)
    size = max(1, _BLOCK // latents[0].numel()) if latents.device.type == "cpu" else batch
    return (slice(first, min(first + size, batch)) for first in range(0, batch, size))


def _row(latents: Tensor) -> Tensor:
    return torch.empty(len(latents), device=latents.device)


def _factors(inputs: StepInputs) -> _Factors:
    """The factors of the whole batch, once for all blocks."""
    coef, latents = inputs.coef, inputs.latents
    x0_latents, x0_output, mean_x0, mean_latents, mean_output, std = (
        _wide(v, latents) for v in coef.tensors().values()
    )
    through_x0 = mean_x0 * x0_output
    # to look costs a GPU more than to add zeros; under a clamp the sum is also what shows a latent that is infinite
    absent = coef.x0_clip is None and latents.device.type == "cpu" and not bool(coef.mean_latents.count_nonzero())
    return _Factors(
        x0_latents, x0_output, mean_x0, None if absent else mean_latents, mean_output, std, through_x0,
        through_x0 + mean_output, coef.x0_clip,
    )  # fmt: skip


def _tensor(value: float | Tensor, device: torch.device) -> Tensor:
    return value if isinstance(value, Tensor) else _single(value, device)


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


def _guided(inputs: StepInputs, part: slice) -> Tensor:
    output = inputs.model_output[part].float()
    if inputs.unconditional_output is None:
        return output
    base = inputs.unconditional_output[part].float()
    return torch.add(base, output - base, alpha=inputs.guidance_scale)


def _mean(output: Tensor, latents: Tensor, factors: _Factors) -> tuple[Tensor, Tensor | None]:
    """Mean of the next latents, a new tensor, and x0 before its clamp if it has one."""
    limit = factors.x0_clip
    x0 = (latents * factors.x0_latents).addcmul_(output, factors.x0_output)
    clamped = x0 if limit is None else torch.nn.functional.hardtanh(x0, -limit, limit)
    mean = clamped.mul_(factors.mean_x0)
    if factors.mean_latents is not None:
        mean.addcmul_(latents, factors.mean_latents)
    return mean.addcmul_(output, factors.mean_output), None if limit is None else x0


def _times_slope(values: Tensor, x0: Tensor | None, factors: _Factors, *, out: Tensor) -> None:
    """out = values·∂mean/∂output."""
    if x0 is None or factors.x0_clip is None:
        torch.mul(values, factors.slope, out=out)
        return
    # hardtanh_backward's range is open, and the clamp's is closed: at ±x0_clip there is a gradient
    edge = _beyond(factors.x0_clip)
    through_x0 = torch.ops.aten.hardtanh_backward(values, x0, -edge, edge).mul_(factors.through_x0)
    torch.addcmul(through_x0, values, factors.mean_output, out=out)


def _mean_square(values: Tensor) -> Tensor:
    """[B]: mean of squares over a sample, by dot products of short rows."""
    flat = values.flatten(1)
    size = flat.shape[1]
    row = math.gcd(size, _ROW)
    rows = flat.view(len(flat), -1, row) if row >= 64 else flat[:, None]
    return torch.linalg.vecdot(rows, rows).sum(1) / size


def _log_prob(mean_square: Tensor, std: Tensor) -> Tensor:
    return -0.5 * mean_square / std.square() - std.log() - 0.5 * math.log(2 * math.pi)
