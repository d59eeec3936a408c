"""StepStats: what one optimizer step says about itself, kept on the device until the iteration's one log line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hrf_fast.distributed import comm
from hrf_fast.windows.base import Window
from hrf_kernels import Surrogate


@dataclass(frozen=True)
class StepStats:
    """Scalars on the device; averages are over samples × steps. On several ranks each holds its share of the sums."""

    loss: Tensor
    """Sum over window steps of the mean clipped loss, averaged over groups: what was differentiated."""
    approx_kl: Tensor
    """Mean k3 estimate of KL(old ‖ new) of the per-pixel-averaged densities."""
    clip_fraction: Tensor
    """Share with |ratio − 1| > clip_range."""
    clipped_fraction: Tensor
    """Share whose gradient the clip stopped."""
    ratio_mean: Tensor
    ratio_max: Tensor
    grad_norm: Tensor
    """Before clipping."""

    @classmethod
    def zeros(cls, device: torch.device) -> StepStats:
        return cls(*(torch.zeros((), device=device) for _ in fields(cls)))

    def add(self, loss: Tensor, surrogate: Surrogate) -> StepStats:
        """Include one forward's surrogate, as sums: `finish` divides, so that a mean of ones is exactly one."""
        return StepStats(
            loss=self.loss + loss,
            approx_kl=self.approx_kl + surrogate.approx_kl.sum(),
            clip_fraction=self.clip_fraction + surrogate.outside.sum(),
            clipped_fraction=self.clipped_fraction + surrogate.clipped.sum(),
            ratio_mean=self.ratio_mean + surrogate.ratio.sum(),
            ratio_max=torch.maximum(self.ratio_max, surrogate.ratio.max()),
            grad_norm=self.grad_norm,
        )

    def finish(self, pairs: int, grad_norm: Tensor) -> StepStats:
        """The stats of a whole optimizer step of `pairs` samples × steps on all ranks."""
        sums = ("approx_kl", "clip_fraction", "clipped_fraction", "ratio_mean")
        means = {name: getattr(self, name) / pairs for name in sums}
        return replace(self, **means, grad_norm=grad_norm)


@dataclass(frozen=True)
class Scores:
    """Rewards of an iteration's groups, or of some of them, by group and on every rank."""

    rewards: dict[int, Tensor]
    """[group_size] each; NaN in a group to skip."""
    advantages: dict[int, Tensor | None]
    """[group_size] each; None for one to skip: a reward of its is not finite and stop.on_nan is skip."""
    terms: dict[int, dict[str, float]]
    """Mean of each reward term, of the groups that are not skipped."""

    def join(self, other: Scores) -> Scores:
        return Scores(self.rewards | other.rewards, self.advantages | other.advantages, self.terms | other.terms)


def summarise(steps: Sequence[StepStats]) -> dict[str, float | None]:
    """Average an iteration's optimizer steps (the largest for ratio_max), in one copy from the device.

    Ranks are added up, but for the norm, which is the same on all, and ratio_max. No step made: no numbers.
    """
    names = [f.name for f in fields(StepStats)]
    if not steps:
        return dict.fromkeys(names)
    own = torch.stack([torch.stack([getattr(step, name).float() for name in names]) for step in steps])
    ranks = comm.gather_rows(own[None])
    largest, mean = ranks.amax((0, 1)), ranks.sum(0).mean(0)
    values = torch.stack([mean, largest, own.mean(0)]).tolist()
    row = {"ratio_max": 1, "grad_norm": 2}
    return {name: values[row.get(name, 0)][i] for i, name in enumerate(names)}


def iteration_record(
    steps: Sequence[StepStats], scores: Scores, windows: Sequence[Window], counters: dict[str, float]
) -> dict[str, Any]:
    """The line of metrics.jsonl for one iteration, less the seconds.

    Args:
        steps: one per optimizer step that was made; scores: of all groups, as the windows.
        counters: numbers known outside (images, evaluations, learning rate, …).
    """
    known = torch.cat([group for group in scores.advantages.values() if group is not None])
    spread = torch.stack([group.std() for group in scores.rewards.values()])
    rewards = torch.cat(list(scores.rewards.values()))
    rewards = rewards[rewards.isfinite()]
    groups = list(scores.terms.values())
    terms = {name: sum(group[name] for group in groups) / len(groups) for name in groups[0]}
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "reward_min": float(rewards.min()),
        "reward_max": float(rewards.max()),
        **({f"reward/{name}": value for name, value in terms.items()} if len(terms) > 1 else {}),
        "advantage_std": float(known.std()),
        "advantage_max": float(known.abs().max()),
        "group_reward_std": float(spread[spread.isfinite()].mean()),
        **summarise(steps),
        "window_starts": [window.start for window in windows],
        "window_steps": sum(len(window) for window in windows),
        **counters,
    }
