"""StepCoefficients: one affine form for every scheduler step, so that no scheduler is known below this line.

StepInputs and ClipInputs are the arguments of a step as the checks and the implementations pass them on, by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepCoefficients:
    """The Gaussian step `next ~ N(mean_x0·x0 + mean_latents·latents + mean_output·model_output, std²)`.

    `x0 = x0_latents·latents + x0_output·model_output`, clamped to ±`x0_clip` when that is set. Each tensor is fp32
    and either a scalar (one step for the whole batch), [S] (a table of steps) or [B] (one step per sample).
    """

    x0_latents: Tensor
    x0_output: Tensor
    mean_x0: Tensor
    mean_latents: Tensor
    mean_output: Tensor
    std: Tensor
    x0_clip: float | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The six tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "x0_clip"}

    def _map(self, function: Callable[[Tensor], Tensor]) -> StepCoefficients:
        tensors = {name: function(tensor) for name, tensor in self.tensors().items()}
        return StepCoefficients(**tensors, x0_clip=self.x0_clip)

    def __len__(self) -> int:
        return len(self.std)

    def __getitem__(self, index: int | slice | Tensor) -> StepCoefficients:
        """Step `index` of a table: an int gives scalars, a slice or an index tensor a smaller table."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> StepCoefficients:
        return self._map(lambda tensor: tensor.to(device))


class StepInputs(NamedTuple):
    """Arguments of one denoising step under the names of the public functions; every tensor is [B, ...]."""

    model_output: Tensor
    latents: Tensor
    coef: StepCoefficients
    unconditional_output: Tensor | None = None
    guidance_scale: float = 1.0
    next_latents: Tensor | None = None
    """None where they are drawn."""
    reference_output: Tensor | None = None


class ClipInputs(NamedTuple):
    """Arguments of the clipped loss beside the step's, in the kernels' order; both clips include the window's scale."""

    old_log_prob: Tensor
    advantages: Tensor
    clip_range: float | Tensor
    advantage_clip: float | Tensor
    """A number, or [B] where `clip_range` is [B]."""
    loss_weight: float
    kl_weight: float | Tensor
    """A number or [B]."""
