"""Trajectory: one group's window as the rollout hands it to the update."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hrf_fast.training.groups import Group
from hrf_fast.windows.base import Window


@dataclass(frozen=True)
class Trajectory:
    """S steps of B samples that share a window, and the images that these led to."""

    group: Group
    latents: Tensor
    """[S+1, B, *latent_shape] fp32, time-major: step i of the window leads from latents[i] to latents[i+1]."""
    old_log_prob: Tensor
    """[S, B] fp32 under the policy that sampled."""
    images: Tensor
    """[B, 3, H, W] fp32 in [0, 1]."""
    reference: Tensor | None = None
    """[R, B, *latent_shape] fp32: the pretrained model's output at the first R steps of the window; None for R = 0."""

    @property
    def window(self) -> Window:
        return self.group.window
