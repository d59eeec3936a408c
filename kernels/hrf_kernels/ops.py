"""The operations as `torch.library.custom_op`s, with shapes for torch.compile and gradients for autograd.

An op does no checking of arguments (that is __init__.py) and no arithmetic (triton_backend.py and analytic.py): it says
which of the two runs, what comes out and how a gradient goes back. Sample-shaped arguments are [B, ...], `coef` the six
tensors of StepCoefficients.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hrf_kernels.checks import check_noise

RESULTS = ("loss", "log_prob", "ratio", "outside", "clipped", "approx_kl", "kl", "slope")
_MODULES = {"eager": "hrf_kernels.analytic", "triton": "hrf_kernels.triton_backend"}


def _module(backend: str) -> ModuleType:
    # imported when first used: Triton need not be installed for the eager one
    return importlib.import_module(_MODULES[backend])


@torch.library.custom_op("hrf_kernels::gaussian_step", mutates_args=())
def gaussian_step(
    model_output: Tensor,
    unconditional: Tensor | None,
    latents: Tensor,
    coef: list[Tensor],
    x0_clip: float | None,
    guidance_scale: float,
    seed_high: int,
    seed_low: int,
    sample_id: Tensor,
    step: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    # an op's int is signed, so an unsigned 64-bit key comes in two halves
    seed = seed_high << 32 | seed_low
    run = _module(backend).gaussian_step
    return run(model_output, unconditional, latents, coef, x0_clip, guidance_scale, seed, sample_id, step)  # type: ignore[no-any-return]


@gaussian_step.register_fake
def _(model_output: Tensor, unconditional: Any, latents: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(latents), _row(latents)


@torch.library.custom_op("hrf_kernels::gaussian_log_prob", mutates_args=())
def gaussian_log_prob(
    model_output: Tensor,
    unconditional: Tensor | None,
    latents: Tensor,
    next_latents: Tensor,
    coef: list[Tensor],
    x0_clip: float | None,
    guidance_scale: float,
    backend: str,
) -> Tensor:
    check_noise(coef[5])
    run = _module(backend).gaussian_log_prob
    return run(model_output, unconditional, latents, next_latents, coef, x0_clip, guidance_scale)  # type: ignore[no-any-return]


@gaussian_log_prob.register_fake
def _(model_output: Tensor, unconditional: Any, latents: Tensor, *_: Any) -> Tensor:
    return _row(latents)


@torch.library.custom_op("hrf_kernels::clipped_surrogate", mutates_args=())
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
    clip_range: float,
    advantage_clip: float,
    clips: list[Tensor],
    loss_weight: float,
    kl_weight: float,
    with_gradient: bool,
    consume: bool,
    backend: str,
) -> list[Tensor]:
    """The RESULTS, [B] each, then the gradients of the outputs where the backend makes them in this pass.

    `clips`, if not empty, holds clip_range and advantage_clip as [B] and replaces the numbers. `consume`: the caller
    keeps no gradient of those returned here, so that the backward pass may scale them in place.
    """
    return _surrogate(
        model_output, unconditional, reference, latents, next_latents, coef, x0_clip, guidance_scale, old_log_prob,
        advantages, clip_range, advantage_clip, clips, loss_weight, kl_weight, with_gradient, consume, backend,
    )  # fmt: skip


def _surrogate(*inputs: Any) -> list[Tensor]:
    *arguments, clip_range, advantage_clip, clips, loss_weight, kl_weight, with_gradient, _, backend = inputs
    check_noise(arguments[5][5])
    numbers = *(clips or (clip_range, advantage_clip)), loss_weight, kl_weight, with_gradient
    results, gradients = _module(backend).clipped_surrogate(*arguments, *numbers)
    return [*results, *gradients]


@clipped_surrogate.register_fake
def _(model_output: Tensor, unconditional: Any, reference: Any, latents: Tensor, *rest: Any) -> list[Tensor]:
    with_gradient, _, backend = rest[-3:]
    results = [_row(latents, torch.bool if name in ("outside", "clipped") else torch.float32) for name in RESULTS]
    if with_gradient and _module(backend).saves_gradient(latents[0].numel()):
        results += [torch.empty_like(output) for output in (model_output, unconditional) if output is not None]
    return results


@torch.library.custom_op("hrf_kernels::output_gradients", mutates_args=())
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
    backend: str,
) -> list[Tensor]:
    """∂/∂model_output, and ∂/∂unconditional if there is one, computed again from the inputs."""
    return _module(backend).output_gradients(  # type: ignore[no-any-return]
        upstream.contiguous(), slope, kl_slope, model_output, unconditional, reference, latents, next_latents, coef,
        x0_clip, guidance_scale,
    )  # fmt: skip


@output_gradients.register_fake
def _(upstream: Any, slope: Any, kl_slope: Any, model_output: Tensor, unconditional: Any, *_: Any) -> list[Tensor]:
    return [torch.empty_like(output) for output in (model_output, unconditional) if output is not None]


def _row(latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return latents.new_empty(len(latents), dtype=dtype)


def _log_prob_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    model_output, unconditional, latents, next_latents, coef, ctx.x0_clip, ctx.guidance_scale, ctx.backend = inputs
    ctx.save_for_backward(model_output, unconditional, latents, next_latents, *coef)


def _log_prob_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    model_output, unconditional, latents, next_latents, *coef = ctx.saved_tensors
    gradients = output_gradients(
        upstream, None, 0.0, model_output, unconditional, None, latents, next_latents, coef, ctx.x0_clip,
        ctx.guidance_scale, ctx.backend,
    )  # fmt: skip
    return (*gradients, *[None] * (2 - len(gradients)), None, None, [None] * len(coef), None, None, None)


def _surrogate_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *samples, coef, ctx.x0_clip, ctx.guidance_scale = inputs[:8]
    # a gradient output is given no gradient: autograd would fill one of the samples' size with zeros
    ctx.set_materialize_grads(False)
    loss_weight, kl_weight, _, ctx.consume, ctx.backend = inputs[-5:]
    ctx.kl_slope = loss_weight * kl_weight
    ctx.coefficients = len(coef)
    ctx.inputs, ctx.clips = len(inputs), len(inputs[12])
    ctx.gradients = len(output) - len(RESULTS)
    ctx.guided = samples[1] is not None
    if ctx.gradients:
        ctx.save_for_backward(*output[len(RESULTS) :])
    else:
        ctx.save_for_backward(output[-1], *samples, *coef)


def _surrogate_backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    incoming = upstream[0]
    gradients: list[Tensor]
    if incoming is None:
        gradients = []
    elif ctx.gradients:
        gradients = list(ctx.saved_tensors)
        # a traced graph has values, not places
        if ctx.consume and not torch.compiler.is_compiling() and type(incoming) is Tensor:
            _module(ctx.backend).scale_gradients(gradients, incoming.contiguous())
        else:
            gradients = [(g * incoming.view(-1, *[1] * (g.dim() - 1))).to(g.dtype) for g in gradients]
    else:
        slope, *tensors = ctx.saved_tensors
        gradients = output_gradients(
            incoming, slope, ctx.kl_slope, *tensors[:5], tensors[5:], ctx.x0_clip, ctx.guidance_scale, ctx.backend
        )
    before, after = [*gradients, None, None][:2], [None] * (ctx.inputs - 6)
    # inputs 5 and 12 are lists
    after[6] = [None] * ctx.clips  # type: ignore[call-overload]
    return (*before, None, None, None, [None] * ctx.coefficients, *after)


torch.library.register_autograd("hrf_kernels::gaussian_log_prob", _log_prob_backward, setup_context=_log_prob_context)


class _Direct(torch.autograd.Function):
    """The same node without the dispatcher, whose flattening of argument lists costs more than a small step does."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(_surrogate(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _surrogate_context(ctx, inputs, list(output))
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        gradients = list(_surrogate_backward(ctx, list(upstream)))
        # here a list is one argument like any other
        return tuple(None if isinstance(value, list) else value for value in gradients)


def surrogate(*inputs: Any) -> list[Tensor]:
    """`clipped_surrogate`: the operation where a graph is traced, its autograd node by itself where none is."""
    if torch.compiler.is_compiling() or type(inputs[0]) not in (Tensor, torch.nn.Parameter):
        return clipped_surrogate(*inputs)
    return list(_Direct.apply(*inputs))


torch.library.register_autograd("hrf_kernels::clipped_surrogate", _surrogate_backward, setup_context=_surrogate_context)
