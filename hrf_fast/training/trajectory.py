"""Window and Trajectory: what a rollout hands to the update."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hrf_fast.windows.base import Window
from hrf_kernels import StepCoefficients


@dataclass(frozen=True)
class Trajectory:
    """One group's window of S steps and the images that it led to; all samples share the window."""

    window: Window
    latents: Tensor
    """[S+1, B, C, H, W] fp32, time-major: step i leads from latents[i] to latents[i+1]."""
    old_log_prob: Tensor
    """[S, B] fp32 under the policy that sampled."""
    timesteps: Tensor
    """[S] int64."""
    coefficients: StepCoefficients
    """[S]."""
    images: Tensor
    """[B, 3, H, W] fp32 in [0, 1]."""

    @property
    def group_size(self) -> int:
        return self.latents.shape[1]
