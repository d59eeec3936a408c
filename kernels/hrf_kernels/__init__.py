"""hrf_kernels: the Gaussian log-prob, the ratio and its clip of a denoising policy, fused.

    gaussian_step       draw the next latents, with their log-prob
    gaussian_log_prob   log-prob of given next latents, differentiable
    clipped_surrogate   the clipped loss of a step, its statistics and the gradient of the model output

Each has the signature and meaning of its namesake in reference.py, plus `backend`: "triton" for the fused kernels,
"eager" for plain torch with its gradient written out, "auto" for the first where tensors are on a GPU and Triton is
installed, else the second. `choose_backend` is the only place that chooses. Group norms of channels-last memory are in
norm.py, for Triton alone.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from hrf_kernels import ops
from hrf_kernels.checks import check_inputs
from hrf_kernels.coefficients import StepCoefficients, StepInputs
from hrf_kernels.philox import philox_normal
from hrf_kernels.reference import Surrogate, clips, gaussian_mean

__all__ = [
    "BACKENDS",
    "StepCoefficients",
    "Surrogate",
    "choose_backend",
    "clipped_surrogate",
    "gaussian_log_prob",
    "gaussian_mean",
    "gaussian_step",
    "philox_normal",
]

BACKENDS = ("auto", "eager", "triton")
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def choose_backend(backend: str, device: torch.device | str) -> tuple[str, str]:
    """(eager or triton, why) for tensors on `device`.

    Raises:
        ValueError: an unknown name, or Triton where it can't run.
    """
    kind = torch.device(device).type
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; use one of {', '.join(BACKENDS)}")
    if backend == "eager":
        return "eager", "asked for"
    if backend == "triton":
        if not _TRITON_INSTALLED:
            raise ValueError('backend="triton" needs the triton package: pip install triton, or use backend="auto"')
        return "triton", "asked for"
    if kind != "cuda":
        return "eager", f"tensors are on {kind}"
    return ("triton", "a GPU and Triton") if _TRITON_INSTALLED else ("eager", "triton is not installed")


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Next latents in the dtype of `latents` and their log-prob [B] fp32; see reference.gaussian_step.

    Not differentiable: sampling is the old policy.

    Raises:
        ValueError, TypeError: names the argument, what was given and what is accepted.
    """
    with torch.no_grad():
        check_inputs(StepInputs(model_output, latents, coef, unconditional_output), sample_id=sample_id)
        for name, value, limit in (("seed", seed, 2**64), ("step", step, 2**32)):
            if not 0 <= value < limit:
                raise ValueError(f"{name} is {value}; use a whole number in [0, {limit})")
        if sample_id.dtype != torch.int64:
            raise TypeError(f"sample_id is {sample_id.dtype}; pass int64")
        return ops.gaussian_step(
            model_output, unconditional_output, latents, _tensors(coef), coef.x0_clip, guidance_scale,
            seed >> 32, seed & 0xFFFFFFFF, sample_id.contiguous(), step, choose_backend(backend, latents.device)[0],
        )  # fmt: skip


def gaussian_log_prob(
    model_output: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    coef: StepCoefficients,
    *,
    unconditional_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """[B] fp32, differentiable in the outputs; see reference.gaussian_log_prob.

    Raises:
        ValueError, TypeError: names the argument, what was given and what is accepted.
    """
    check_inputs(StepInputs(model_output, latents, coef, unconditional_output, next_latents=next_latents))
    return ops.gaussian_log_prob(
        model_output, unconditional_output, latents, next_latents, _tensors(coef), coef.x0_clip,
        guidance_scale, choose_backend(backend, latents.device)[0],
    )  # fmt: skip


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
    backend: str = "auto",
) -> Surrogate:
    """The clipped loss of one denoising step per sample and its statistics; see reference.clipped_surrogate.

    Sum the losses (divide by `loss_weight`, not afterwards): then the backward pass of a small sample costs nothing.

    Raises:
        ValueError, TypeError: names the argument, what was given and what is accepted.
    """
    inputs = StepInputs(
        model_output, latents, coef, unconditional_output, guidance_scale, next_latents, reference_output
    )
    per_sample = {"old_log_prob": old_log_prob, "advantages": advantages}
    kl_weights = kl_weight.float().contiguous() if isinstance(kl_weight, Tensor) else None
    if kl_weights is not None:
        per_sample["kl_weight"] = kl_weights
    check_inputs(inputs, **per_sample)
    numbers, tensors = _clips(latents, clip_range, advantage_clip, window_scale)
    outputs = [output for output in (model_output, unconditional_output) if output is not None]
    wants_gradient = torch.is_grad_enabled() and any(output.requires_grad for output in outputs)
    # made in the forward pass a gradient has no loss scale yet, without which fp16 rounds it to zero
    in_forward = wants_gradient and all(output.dtype != torch.float16 for output in outputs)
    results = ops.clipped_surrogate(
        model_output, unconditional_output, reference_output, latents, next_latents, _tensors(coef),
        coef.x0_clip, guidance_scale, old_log_prob.float().contiguous(), advantages.float().contiguous(), *numbers,
        tensors, loss_weight, kl_weight if kl_weights is None else 1.0, kl_weights, in_forward, True,
        choose_backend(backend, latents.device)[0],
    )  # fmt: skip
    return Surrogate(*results[: len(Surrogate._fields)])


def _clips(
    latents: Tensor, clip_range: float | Tensor, advantage_clip: float | Tensor, window_scale: float | Tensor
) -> tuple[tuple[float, float], list[Tensor]]:
    """Both clips, scaled, as numbers or as [B] tensors."""
    if not any(isinstance(value, Tensor) for value in (clip_range, advantage_clip, window_scale)):
        return (clip_range * window_scale, advantage_clip * window_scale), []  # type: ignore[return-value]
    scaled = clips(latents, clip_range, advantage_clip, window_scale)
    return (0.0, 0.0), [value.expand(len(latents)).contiguous() for value in scaled]


def _tensors(coef: StepCoefficients) -> list[Tensor]:
    """The six tensors as the operations take them: [B] ones dense."""
    return [value.contiguous() for value in coef.tensors().values()]
