"""Refusals of every implementation: shapes, devices, layouts and numbers that it would compute nonsense from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hrf_kernels.coefficients import StepCoefficients, StepInputs

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# for differentiating in tests; no kernel takes it
WIDE = torch.float64


def check_samples(latents: Tensor, coef: StepCoefficients, **tensors: Tensor | None) -> None:
    """`tensors` are sample-shaped like `latents` [B, ...] and on its device; `coef` has scalars or [B].

    Raises:
        ValueError, TypeError: names the argument, what was given and what is accepted.
    """
    if latents.dim() < 2 or latents.numel() == 0:
        raise ValueError(f"latents are {tuple(latents.shape)}; pass [B, C, H, W] with at least one sample and element")
    for name, tensor in {"latents": latents, **tensors}.items():
        if tensor is None:
            continue
        if tensor.shape != latents.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} but latents are {tuple(latents.shape)}")
        if tensor.device != latents.device:
            raise ValueError(f"{name} is on {tensor.device} but latents are on {latents.device}; move one of them")
        if tensor.dtype not in (*FLOATS, WIDE):
            raise TypeError(f"{name} is {tensor.dtype}; pass float32, bfloat16 or float16")
    for name, value in coef.tensors().items():
        if value.shape != coef.std.shape or value.dim() > 1 or (value.dim() == 1 and len(value) != len(latents)):
            raise ValueError(
                f"coefficient {name} is {tuple(value.shape)} and std {tuple(coef.std.shape)} for a batch of "
                f"{len(latents)}; pass six scalars, or six of [{len(latents)}]"
            )
        if value.device != latents.device:
            raise ValueError(f"coefficient {name} is on {value.device} but latents are on {latents.device}; use .to()")
    if coef.x0_clip is not None and not 0 < coef.x0_clip < math.inf:
        raise ValueError(f"x0_clip is {coef.x0_clip}; use a finite bound above 0, or None")


def check_per_sample(latents: Tensor, **values: Tensor) -> None:
    """Refuse what would broadcast silently: one number per sample is wanted."""
    for name, value in values.items():
        if value.shape != latents.shape[:1]:
            raise ValueError(f"{name} is {tuple(value.shape)} but the batch is {len(latents)}; pass [{len(latents)}]")
        if value.device != latents.device:
            raise ValueError(f"{name} is on {value.device} but latents are on {latents.device}; move one of them")


def check_inputs(inputs: StepInputs, **per_sample: Tensor) -> None:
    """Everything that eager.py and fused.py want of a step: dense float32, bfloat16 or float16 besides the above.

    Only the model outputs get a gradient: where gradients are on, no other tensor may ask for one.

    Raises:
        ValueError, TypeError: names the argument, what was given and what is accepted.
    """
    latents, coef = inputs.latents, inputs.coef
    outputs = {"model_output": inputs.model_output, "unconditional_output": inputs.unconditional_output}
    fixed = {"next_latents": inputs.next_latents, "reference_output": inputs.reference_output}
    check_per_sample(latents, **per_sample)
    check_samples(latents, coef, **outputs, **fixed)
    fixed["latents"] = latents
    for name, tensor in {**outputs, **fixed}.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} is {tensor.dtype}; the fused kernels take float32, bfloat16 or float16")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous (strides {tensor.stride()}); pass {name}.contiguous()")
    for name, value in coef.tensors().items():
        if value.dtype != torch.float32:
            raise TypeError(f"coefficient {name} is {value.dtype}; the fused kernels take float32")
    if torch.is_grad_enabled():
        for name, tensor in {**fixed, **per_sample}.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name} requires a gradient, but only model outputs get one; pass {name}.detach()")


def check_noise(std: Tensor) -> None:
    """Refuse a deterministic step, which has no density; on a GPU, where looking means waiting, the result is NaN."""
    if std.device.type == "cpu" and not bool((std > 0).all()):
        raise ValueError(
            f"coefficient std is {std.min().item():g}; a step has a log-prob only where std > 0: leave the "
            "deterministic last step out of the window"
        )
