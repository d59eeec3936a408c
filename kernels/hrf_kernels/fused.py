"""The Triton implementation: each function of eager.py as kernel launches; arguments are checked."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from hrf_kernels.coefficients import ClipInputs, StepCoefficients, StepInputs
from hrf_kernels.launch import ROWS, BlockPlan, block_plan, check_device, launch
from hrf_kernels.reference import RESULTS
from hrf_kernels.step import step_kernel
from hrf_kernels.surrogate import finalize_kernel, gradient_kernel, one_program_kernel, scale_kernel, sums_kernel


def saves_gradient(size: int) -> bool:
    """Whether the surrogate of a sample of `size` elements writes its gradient in the forward pass."""
    return block_plan(size).one_program


def gaussian_step(
    inputs: StepInputs, seed: int, sample_id: Tensor, step: int, *, one_program: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Next latents like `latents`, and their log-prob [B] fp32."""
    latents = inputs.latents
    batch, size, plan = _plan(latents, one_program)
    next_latents, log_prob = torch.empty_like(latents), _empty(latents)
    sums = _sums(latents, plan)
    launch(
        step_kernel, (batch, plan.chunks), latents.device,
        inputs.model_output, inputs.unconditional_output, latents, next_latents, sample_id, sums, log_prob,
        *_numbers(inputs), _word(seed), _word(seed >> 32), _word(step), size,
        **_meta(inputs.coef), BLOCK=plan.block, ITERATIONS=plan.iterations, threads=plan.threads,
        max_registers=128 if size % 16 and not plan.one_program else 0,
    )  # fmt: skip
    if sums is not None:
        _finalize(sums, inputs.coef.std, size, {"log_prob": log_prob})
    return next_latents, log_prob


def gaussian_log_prob(inputs: StepInputs, *, one_program: bool | None = None) -> Tensor:
    """Log-prob of the next latents, [B] fp32."""
    latents = inputs.latents
    _, size, plan = _plan(latents, one_program)
    log_prob, sums = _empty(latents), _sums(latents, plan)
    _sum_squares(inputs, plan, sums, None, log_prob)
    if sums is not None:
        _finalize(sums, inputs.coef.std, size, {"log_prob": log_prob})
    return log_prob


def clipped_surrogate(
    inputs: StepInputs, clips: ClipInputs, *, with_gradient: bool, one_program: bool | None = None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(reference.RESULTS by name, gradients of the outputs if asked for and written already)."""
    latents = inputs.latents
    batch, size, plan = _plan(latents, one_program)
    results = {name: _empty(latents, dtype) for name, dtype in RESULTS.items()}
    sums = _sums(latents, plan)
    if sums is not None:
        shift_sums = None if inputs.reference_output is None else _sums(latents, plan)
        _sum_squares(inputs, plan, sums, shift_sums, None)
        _finalize(sums, inputs.coef.std, size, results, shift_sums, clips)
        return results, []
    gradients = _gradients(inputs) if with_gradient else []
    launch(
        one_program_kernel, (batch,), latents.device,
        *_samples(inputs), *_pair(gradients), *_numbers(inputs), *clips, *results.values(), size,
        **_meta(inputs.coef), **_per_sample(clips), BLOCK=plan.block, threads=plan.threads,
    )  # fmt: skip
    return results, gradients


def output_gradients(
    inputs: StepInputs, upstream: Tensor, slope: Tensor | None, kl_slope: float, kl_weights: Tensor | None = None
) -> list[Tensor]:
    """Gradients of the model output(s), like them; `upstream`, `slope` and `kl_weights` are [B] fp32."""
    # elementwise, so that its plan is free of the sums' order
    batch, size, plan = _plan(inputs.latents, one_program=False)
    gradients = _gradients(inputs)
    launch(
        gradient_kernel, (batch, plan.chunks), inputs.latents.device,
        *_samples(inputs), *_pair(gradients), *_numbers(inputs), upstream, slope, kl_slope, kl_weights, size,
        **_meta(inputs.coef), BLOCK=plan.block, ITERATIONS=plan.iterations, threads=plan.threads,
    )  # fmt: skip
    return gradients


def scale_gradients(gradients: list[Tensor], upstream: Tensor) -> None:
    """Multiply each sample's gradient by upstream [B], in place."""
    for gradient in gradients:
        batch, size, plan = _plan(gradient, one_program=False)
        launch(
            scale_kernel, (batch, plan.chunks), gradient.device,
            gradient, upstream, size, BLOCK=plan.block, ITERATIONS=plan.iterations, threads=plan.threads,
        )  # fmt: skip
        # autograd does not see a kernel write: without this a second backward pass would scale twice in silence
        torch.autograd.graph.increment_version(gradient)


def _sum_squares(
    inputs: StepInputs, plan: BlockPlan, sums: Tensor | None, shift_sums: Tensor | None, log_prob: Tensor | None
) -> None:
    latents = inputs.latents
    launch(
        sums_kernel, (len(latents), plan.chunks), latents.device,
        *_samples(inputs), sums, shift_sums, log_prob, *_numbers(inputs), latents[0].numel(),
        **_meta(inputs.coef), BLOCK=plan.block, ITERATIONS=plan.iterations, threads=plan.threads,
    )  # fmt: skip


def _finalize(
    sums: Tensor,
    std: Tensor,
    size: int,
    results: dict[str, Tensor],
    shift_sums: Tensor | None = None,
    clips: ClipInputs | None = None,
) -> None:
    """Fill `results` from the sums of each chunk: the log-prob alone without clips, else all of reference.RESULTS."""
    batch, chunks = sums.shape
    launch(
        finalize_kernel, (triton.cdiv(batch, ROWS),), sums.device,
        sums, shift_sums, std, *(clips or (None, None, 0.0, 0.0, 0.0, 0.0)), *map(results.get, RESULTS),
        batch, chunks, size,
        PER_SAMPLE=std.dim(), **_per_sample(clips),
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


def _gradients(inputs: StepInputs) -> list[Tensor]:
    outputs = (inputs.model_output, inputs.unconditional_output)
    return [torch.empty_like(output) for output in outputs if output is not None]


def _pair(gradients: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    first, second = [*gradients, None, None][:2]
    return first, second


def _samples(inputs: StepInputs) -> tuple[Tensor | None, ...]:
    """The inputs that are samples, in the kernels' order."""
    outputs = (inputs.model_output, inputs.unconditional_output, inputs.reference_output)
    return (*outputs, inputs.latents, inputs.next_latents)


def _numbers(inputs: StepInputs) -> tuple[Any, ...]:
    """The inputs that are numbers, in the kernels' order."""
    coef = inputs.coef
    return (*coef.tensors().values(), 0.0 if coef.x0_clip is None else coef.x0_clip, inputs.guidance_scale)


def _meta(coef: StepCoefficients) -> dict[str, Any]:
    return {"PER_SAMPLE": coef.std.dim(), "CLAMP": coef.x0_clip is not None}


def _per_sample(clips: ClipInputs | None) -> dict[str, bool]:
    """Which of the clips and the weight of the KL are [B] tensors rather than numbers."""
    named = {"CLIPS_PER_SAMPLE": clips and clips.clip_range, "KL_PER_SAMPLE": clips and clips.kl_weight}
    return {name: isinstance(value, Tensor) for name, value in named.items()}


def _word(value: int) -> int:
    """The low 32 bits as a signed number, so that every key has one kernel signature."""
    low = value & 0xFFFFFFFF
    return low - 2**32 if low >= 2**31 else low
