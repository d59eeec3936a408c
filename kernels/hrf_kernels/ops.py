"""The operations as `torch.library.custom_op`s, with shapes for torch.compile and gradients for autograd.

An operation checks no argument but std, which a traced call has no number of, and computes nothing (eager.py and
fused.py do): this file says which of the two runs, what comes out and how a gradient goes back. The dispatcher takes
flat arguments only, so that StepInputs begin here; `coef` is the six tensors of StepCoefficients in their order.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hrf_kernels.checks import check_noise
from hrf_kernels.coefficients import ClipInputs, StepCoefficients, StepInputs
from hrf_kernels.reference import RESULTS

_MODULES = {"eager": "hrf_kernels.eager", "triton": "hrf_kernels.fused"}


def _module(backend: str) -> ModuleType:
    # imported when first used: Triton need not be installed for the eager one
    return importlib.import_module(_MODULES[backend])


def _coefficients(coef: list[Tensor], x0_clip: float | None) -> StepCoefficients:
    fields: tuple[Any, ...] = (*coef, x0_clip)
    return StepCoefficients(*fields)


@torch.library.custom_op("hrf_kernels::gaussian_step", mutates_args=())
def gaussian_step(
    model_output: Tensor, unconditional_output: Tensor | None,
    latents: Tensor, coef: list[Tensor], x0_clip: float | None, guidance_scale: float,
    seed_high: int, seed_low: int, sample_id: Tensor, step: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs = StepInputs(model_output, latents, _coefficients(coef, x0_clip), unconditional_output, guidance_scale)
    # an op's int is signed, so an unsigned 64-bit key comes in two halves
    return _module(backend).gaussian_step(inputs, seed_high << 32 | seed_low, sample_id, step)  # type: ignore[no-any-return]


@gaussian_step.register_fake
def _(model_output: Tensor, unconditional_output: Any, latents: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(latents), _row(latents)


@torch.library.custom_op("hrf_kernels::gaussian_log_prob", mutates_args=())
def gaussian_log_prob(
    model_output: Tensor, unconditional_output: Tensor | None,
    latents: Tensor, next_latents: Tensor, coef: list[Tensor], x0_clip: float | None, guidance_scale: float,
    backend: str,
) -> Tensor:  # fmt: skip
    step_coef = _coefficients(coef, x0_clip)
    check_noise(step_coef.std)
    inputs = StepInputs(model_output, latents, step_coef, unconditional_output, guidance_scale, next_latents)
    return _module(backend).gaussian_log_prob(inputs)  # type: ignore[no-any-return]


@gaussian_log_prob.register_fake
def _(model_output: Tensor, unconditional_output: Any, latents: Tensor, *_: Any) -> Tensor:
    return _row(latents)


@torch.library.custom_op("hrf_kernels::clipped_surrogate", mutates_args=())
def clipped_surrogate(
    model_output: Tensor, unconditional_output: Tensor | None, reference_output: Tensor | None,
    latents: Tensor, next_latents: Tensor, coef: list[Tensor], x0_clip: float | None, guidance_scale: float,
    old_log_prob: Tensor, advantages: Tensor, clip_range: float, advantage_clip: float, clips: list[Tensor],
    loss_weight: float, kl_weight: float, kl_weights: Tensor | None, with_gradient: bool, consume: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    """The RESULTS, then the gradients of the outputs where the backend makes them in this pass.

    `clips`, if not empty, holds clip_range and advantage_clip as [B] and replaces the numbers, as `kl_weights` [B] does
    kl_weight. `consume`: the caller keeps no gradient of those returned here, so that the backward pass may scale them
    in place.
    """
    step_coef = _coefficients(coef, x0_clip)
    check_noise(step_coef.std)
    inputs = StepInputs(
        model_output, latents, step_coef, unconditional_output, guidance_scale, next_latents, reference_output
    )
    ratio_clip, bound = clips or (clip_range, advantage_clip)
    weight = kl_weight if kl_weights is None else kl_weights
    clip_inputs = ClipInputs(old_log_prob, advantages, ratio_clip, bound, loss_weight, weight)
    results, gradients = _module(backend).clipped_surrogate(inputs, clip_inputs, with_gradient=with_gradient)
    return [*(results[name] for name in RESULTS), *gradients]


@clipped_surrogate.register_fake
def _(model_output: Tensor, unconditional_output: Any, reference: Any, latents: Tensor, *rest: Any) -> list[Tensor]:
    *_, with_gradient, consume, backend = rest
    results = [_row(latents, dtype) for dtype in RESULTS.values()]
    if with_gradient and _module(backend).saves_gradient(latents[0].numel()):
        results += _like(model_output, unconditional_output)
    return results


@torch.library.custom_op("hrf_kernels::output_gradients", mutates_args=())
def output_gradients(
    upstream: Tensor, slope: Tensor | None, kl_slope: float, kl_weights: Tensor | None,
    model_output: Tensor, unconditional_output: Tensor | None, reference_output: Tensor | None,
    latents: Tensor, next_latents: Tensor, coef: list[Tensor], x0_clip: float | None, guidance_scale: float,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    """∂/∂model_output, and ∂/∂unconditional_output if there is one, computed again from the inputs.

    `kl_weights` [B] is a factor of kl_slope, if given.
    """
    step_coef = _coefficients(coef, x0_clip)
    inputs = StepInputs(
        model_output, latents, step_coef, unconditional_output, guidance_scale, next_latents, reference_output
    )
    return _module(backend).output_gradients(inputs, upstream.contiguous(), slope, kl_slope, kl_weights)  # type: ignore[no-any-return]


@output_gradients.register_fake
def _(
    upstream: Any, slope: Any, kl_slope: Any, kl_weights: Any, model_output: Tensor, unconditional: Any, *_: Any
) -> list[Tensor]:  # fmt: skip
    return _like(model_output, unconditional)


def _row(latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return latents.new_empty(len(latents), dtype=dtype)


def _like(*outputs: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(output) for output in outputs if output is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], *tensors: Tensor | None) -> None:
    # the dispatcher wants a None for each input without a gradient, and a list of them for a list
    ctx.none = [[None] * len(value) if isinstance(value, list) else None for value in inputs]
    ctx.save_for_backward(*tensors)


def _log_prob_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    model_output, unconditional_output, latents, next_latents, coef, *numbers = inputs
    ctx.x0_clip, ctx.guidance_scale, ctx.backend = numbers
    ctx.kl_slope = 0.0
    _keep(ctx, inputs, None, None, model_output, unconditional_output, None, latents, next_latents, *coef)


def _log_prob_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    return _for_inputs(ctx, _recomputed(ctx, upstream))


def _surrogate_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    model_output, unconditional_output, reference_output, latents, next_latents, coef, *numbers = inputs
    ctx.x0_clip, ctx.guidance_scale, *_, loss_weight, kl_weight, kl_weights, _, ctx.consume, ctx.backend = numbers
    ctx.kl_slope = loss_weight * kl_weight
    loss, *others = output
    ctx.mark_non_differentiable(*others)
    # autograd would fill a gradient of each of the others with zeros
    ctx.set_materialize_grads(False)
    ctx.written = len(output) > len(RESULTS)
    if ctx.written:
        _keep(ctx, inputs, *output[len(RESULTS) :])
    else:
        slope = dict(zip(RESULTS, output, strict=True))["slope"]
        samples = (model_output, unconditional_output, reference_output, latents, next_latents)
        _keep(ctx, inputs, slope, kl_weights, *samples, *coef)


def _surrogate_backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    of_loss, *_ = upstream
    gradients: list[Tensor] = []
    if of_loss is not None:
        gradients = _scaled(ctx, of_loss) if ctx.written else _recomputed(ctx, of_loss)
    return _for_inputs(ctx, gradients)


def _scaled(ctx: Any, upstream: Tensor) -> list[Tensor]:
    """The gradients that the forward pass wrote, times upstream."""
    gradients = list(ctx.saved_tensors)
    # a traced graph has values, not places
    if ctx.consume and not torch.compiler.is_compiling() and type(upstream) is Tensor:
        _module(ctx.backend).scale_gradients(gradients, upstream.contiguous())
        return gradients
    return [(g * upstream.view(-1, *[1] * (g.dim() - 1))).to(g.dtype) for g in gradients]


def _recomputed(ctx: Any, upstream: Tensor) -> list[Tensor]:
    """The gradients by a second pass over the inputs."""
    slope, kl_weights, *samples = ctx.saved_tensors
    # five samples; the rest is coef
    return output_gradients(
        upstream, slope, ctx.kl_slope, kl_weights, *samples[:5], samples[5:], ctx.x0_clip, ctx.guidance_scale,
        ctx.backend,
    )  # fmt: skip


def _for_inputs(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    """Gradients of the outputs of the model, which are the first inputs, and None for each other one."""
    return (*gradients, *ctx.none[len(gradients) :])


gaussian_log_prob.register_autograd(_log_prob_backward, setup_context=_log_prob_context)
clipped_surrogate.register_autograd(_surrogate_backward, setup_context=_surrogate_context)
