"""Trajectory: one group's window as the rollout hands it to the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hrf_fast.training.groups import Group
from hrf_fast.windows.base import Window


@dataclass(frozen=True)
class Trajectory:
    """S steps of B samples that share a window."""

    group: Group
    latents: Tensor
    """[S+1, B, *latent_shape] fp32, time-major: step i of the window leads from latents[i] to latents[i+1]."""
    old_log_prob: Tensor
    """[S, B] fp32 under the policy that sampled."""
    reference: Tensor | None = None
    """[R, B, *latent_shape] fp32: the pretrained model's output at the first R steps of the window; None for R = 0."""

    @property
    def window(self) -> Window:
        return self.group.window


def cat(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of several; of a single one itself, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))
