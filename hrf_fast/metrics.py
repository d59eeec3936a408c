"""StepStats: what one optimizer step says about itself, kept on the device until the iteration's one log line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hrf_fast.trajectory import Trajectory
from hrf_kernels import Surrogate


@dataclass(frozen=True)
class StepStats:
    """Scalars on the device; averages are over samples × steps."""

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
        """The stats of a whole optimizer step of `pairs` samples × steps."""
        sums = ("approx_kl", "clip_fraction", "clipped_fraction", "ratio_mean")
        means = {name: getattr(self, name) / pairs for name in sums}
        return replace(self, **means, grad_norm=grad_norm)


def summarise(steps: Sequence[StepStats]) -> dict[str, float]:
    """Average an iteration's optimizer steps (the largest for ratio_max), in one copy from the device."""
    table = torch.stack([torch.stack([getattr(step, f.name).float() for f in fields(StepStats)]) for step in steps])
    mean, largest = table.mean(0), table.max(0).values
    values = torch.stack([mean, largest]).tolist()
    return {f.name: values[f.name == "ratio_max"][i] for i, f in enumerate(fields(StepStats))}


def iteration_record(
    steps: Sequence[StepStats],
    rewards: Tensor,
    advantages: Sequence[Tensor],
    trajectories: Sequence[Trajectory],
    *,
    terms: dict[str, Tensor],
    counters: dict[str, float],
) -> dict[str, Any]:
    """The line of metrics.jsonl for one iteration, less the seconds.

    Args:
        steps: one per optimizer step; rewards: [N]; advantages: [B] per group.
        terms: mean of each reward term; counters: numbers known outside (images, evaluations, learning rate, …).
    """
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "reward_min": float(rewards.min()),
        "reward_max": float(rewards.max()),
        **({f"reward/{name}": float(value) for name, value in terms.items()} if len(terms) > 1 else {}),
        "advantage_std": float(torch.cat(list(advantages)).std()),
        "advantage_max": float(torch.cat(list(advantages)).abs().max()),
        "group_reward_std": float(torch.stack([g.std() for g in rewards.split([len(a) for a in advantages])]).mean()),
        **summarise(steps),
        "window_starts": [trajectory.window.start for trajectory in trajectories],
        "window_steps": sum(len(trajectory.window) for trajectory in trajectories),
        **counters,
    }
