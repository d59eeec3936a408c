"""HRF-D's criterion: which candidate start is chosen, from measured rewards and distances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select_start(candidates: Sequence[int], rewards: Tensor, distances: Tensor, *, beta: float) -> int:
    """Choose the start of the greatest Δ̂_i − β·d̂_i, where Δ_i = r_{i+1} − r_i and d_i is the distance of candidate i+1.

    Args:
        candidates: C starts; rewards, distances: [C] mean reward and mean 1 − cosine to the anchor of each.

    Returns:
        The chosen start, never the last candidate. Both lists are min-max normalised; a constant one counts as zeros.
    """
    criterion = start_criterion(rewards.double().diff(), distances.double()[1:], beta=beta)
    return candidates[int(criterion.argmax())]


def start_criterion(changes: Tensor, distances: Tensor, *, beta: float) -> Tensor:
    """Δ̂ − β·d̂ [C − 1] of the starts that can be chosen, both min-max normalised."""
    return _min_max(changes) - beta * _min_max(distances)


def _min_max(values: Tensor) -> Tensor:
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else torch.zeros_like(values)
