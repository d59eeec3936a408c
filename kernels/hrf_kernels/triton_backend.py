"""The Triton implementation: what ops.py calls, as kernel launches. analytic.py has the same functions in plain torch.

Arguments are what reference.py says, positional and checked; `coef` is the six tensors of StepCoefficients in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hrf_kernels.launch import ROWS, BlockPlan, block_plan, check_device, launch
from hrf_kernels.step import step_kernel
from hrf_kernels.surrogate import finalize_kernel, gradient_kernel, one_program_kernel, scale_kernel, sums_kernel


def saves_gradient(size: int) -> bool:
    """Whether the surrogate of a sample of `size` elements writes its gradient in the forward pass."""
    return block_plan(size).one_program


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
    *,
    one_program: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Next latents like `latents`, and their log-prob [B] fp32."""
    batch, size, plan = _plan(latents, one_program)
    next_latents, log_prob = torch.empty_like(latents), _empty(latents)
    sums = _sums(latents, plan)
    launch(
        step_kernel, (batch, plan.chunks), latents.device,
        model_output, unconditional, latents, next_latents, sample_id, sums, log_prob,
        *_step(coef, x0_clip), guidance_scale, _word(seed), _word(seed >> 32), _word(step), size,
        **_meta(coef, x0_clip), BLOCK=plan.block, ITERATIONS=plan.iterations, threads=plan.threads,
        max_registers=128 if size % 16 and not plan.one_program else 0,
    )  # fmt: skip
    if sums is not None:
        _finalize(sums, None, coef, size, log_prob)
    return next_latents, log_prob


def gaussian_log_prob(
    model_output: Tensor,
    unconditional: Tensor | None,
    latents: Tensor,
    next_latents: Tensor,
    coef: list[Tensor],
    x0_clip: float | None,
    guidance_scale: float,
    *,
    one_program: bool | None = None,
) -> Tensor:
    """[B] fp32."""
    _, size, plan = _plan(latents, one_program)
    log_prob, sums = _empty(latents), _sums(latents, plan)
    outputs = (model_output, unconditional, None)
    _sum_squares(outputs, latents, next_latents, coef, x0_clip, guidance_scale, plan, sums, None, log_prob)
    if sums is not None:
        _finalize(sums, None, coef, size, log_prob)
    return log_prob


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
    *,
    one_program: bool | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """([loss, log_prob, ratio, outside, clipped, approx_kl, kl, slope], gradients if written already)."""
    batch, size, plan = _plan(latents, one_program)
    results = [_empty(latents, torch.bool if name in ("outside", "clipped") else torch.float32) for name in RESULTS]
    clips = (old_log_prob, advantages, clip_range, advantage_clip, loss_weight, kl_weight)
    if not plan.one_program:
        sums = _sums(latents, plan)
        shift_sums = None if reference is None else _sums(latents, plan)
        outputs = (model_output, unconditional, reference)
        _sum_squares(outputs, latents, next_latents, coef, x0_clip, guidance_scale, plan, sums, shift_sums, None)
        assert sums is not None
        _finalize(sums, shift_sums, coef, size, None, clips, results)
        return results, []
    gradients = _gradients(model_output, unconditional) if with_gradient else []
    launch(
        one_program_kernel, (batch,), latents.device,
        model_output, unconditional, reference, latents, next_latents, *_pair(gradients),
        *_step(coef, x0_clip), guidance_scale, *clips, *results, size,
        **_meta(coef, x0_clip), CLIPS_PER_SAMPLE=_tensors(clips), BLOCK=plan.block, threads=plan.threads,
    )  # fmt: skip
    return results, gradients


RESULTS = ("loss", "log_prob", "ratio", "outside", "clipped", "approx_kl", "kl", "slope")


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
    batch, size, _ = _plan(latents, None)
    # elementwise, so that its plan is free of the sums' order
    plan = block_plan(size, one_program=False)
    gradients = _gradients(model_output, unconditional)
    launch(
        gradient_kernel, (batch, plan.chunks), latents.device,
        model_output, unconditional, reference, latents, next_latents, *_pair(gradients),
        *_step(coef, x0_clip), guidance_scale, upstream, slope, kl_slope, size,
        **_meta(coef, x0_clip), BLOCK=plan.block, ITERATIONS=plan.iterations, threads=plan.threads,
    )  # fmt: skip
    return gradients


def scale_gradients(gradients: list[Tensor], upstream: Tensor) -> None:
    """Multiply each sample's gradient by upstream [B], in place."""
    for gradient in gradients:
        batch, size, _ = _plan(gradient, None)
        plan = block_plan(size, one_program=False)
        launch(
            scale_kernel, (batch, plan.chunks), gradient.device,
            gradient, upstream, size, BLOCK=plan.block, ITERATIONS=plan.iterations, threads=plan.threads,
        )  # fmt: skip
        # autograd does not see a kernel write: without this a second backward pass would scale twice in silence
        torch.autograd.graph.increment_version(gradient)


def _sum_squares(
    outputs: tuple[Tensor, Tensor | None, Tensor | None],
    latents: Tensor,
    next_latents: Tensor,
    coef: list[Tensor],
    x0_clip: float | None,
    guidance_scale: float,
    plan: BlockPlan,
    sums: Tensor | None,
    shift_sums: Tensor | None,
    log_prob: Tensor | None,
) -> None:
    launch(
        sums_kernel, (len(latents), plan.chunks), latents.device,
        *outputs, latents, next_latents, sums, shift_sums, log_prob,
        *_step(coef, x0_clip), guidance_scale, latents[0].numel(),
        **_meta(coef, x0_clip), BLOCK=plan.block, ITERATIONS=plan.iterations, threads=plan.threads,
    )  # fmt: skip


def _finalize(
    sums: Tensor,
    shift_sums: Tensor | None,
    coef: list[Tensor],
    size: int,
    log_prob: Tensor | None,
    clips: tuple[Any, ...] = (None, None, 0.0, 0.0, 0.0, 0.0),
    results: list[Tensor] | None = None,
) -> None:
    batch, chunks = sums.shape
    outputs: list[Any] = results or [None, log_prob, None, None, None, None, None, None]
    launch(
        finalize_kernel, (triton.cdiv(batch, ROWS),), sums.device,
        sums, shift_sums, coef[5], *clips, *outputs, batch, chunks, size,
        PER_SAMPLE=coef[5].dim(), CLIPS_PER_SAMPLE=_tensors(clips),
    )  # fmt: skip


def _plan(latents: Tensor, one_program: bool | None) -> tuple[int, int, BlockPlan]:
    check_device(latents.device)
    size = latents[0].numel()
    return len(latents), size, block_plan(size, one_program=one_program)


def _empty(latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(len(latents), device=latents.device, dtype=dtype)


def _sums(latents: Tensor, plan: BlockPlan) -> Tensor | None:
    """Room for each chunk's partial sum, where a sample has several."""
    return None if plan.one_program else torch.empty(len(latents), plan.chunks, device=latents.device)


def _gradients(model_output: Tensor, unconditional: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(output) for output in (model_output, unconditional) if output is not None]


def _pair(gradients: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    first, second = [*gradients, None, None][:2]
    return first, second


def _step(coef: list[Tensor], x0_clip: float | None) -> tuple[Any, ...]:
    return (*coef, 0.0 if x0_clip is None else x0_clip)


def _meta(coef: list[Tensor], x0_clip: float | None) -> dict[str, Any]:
    return {"PER_SAMPLE": coef[0].dim(), "CLAMP": x0_clip is not None}


def _tensors(clips: tuple[Any, ...]) -> bool:
    """Whether the clips are [B] tensors rather than numbers."""
    return isinstance(clips[2], Tensor)


def _word(value: int) -> int:
    """The low 32 bits as a signed number, so that every key has the same kernel signature."""
    low = value & 0xFFFFFFFF
    return low - 2**32 if low >= 2**31 else low
