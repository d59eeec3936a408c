"""StepStats: statistics of one optimizer step, kept on the device until the iteration's one log line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hrf_fast.distributed import comm
from hrf_fast.training.rewarding import GroupRewards
from hrf_fast.windows.base import Window
from hrf_kernels import Surrogate

# left out of the log where train.gradient_noise is off
MEASURED = ("gradient_signal", "gradient_noise")


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
    reference_kl: Tensor
    """Mean KL(policy ‖ pretrained model) of a step; steps at which that is not asked count as 0."""
    gradient_signal: Tensor
    """Estimate of the squared norm of the gradient's expectation; NaN where it is not measured."""
    gradient_noise: Tensor
    """Estimate of the trace of the covariance of one group's gradient; NaN where it is not measured."""

    @classmethod
    def zeros(cls, device: torch.device) -> StepStats:
        return cls(*(torch.zeros((), device=device) for _ in fields(cls)))

    def add(self, loss: Tensor, surrogate: Surrogate) -> StepStats:
        """Include one call's surrogate, as sums: `finish` divides, so that a mean of ones is exactly one."""
        return StepStats(
            loss=self.loss + loss,
            approx_kl=self.approx_kl + surrogate.approx_kl.sum(),
            clip_fraction=self.clip_fraction + surrogate.outside.sum(),
            clipped_fraction=self.clipped_fraction + surrogate.clipped.sum(),
            ratio_mean=self.ratio_mean + surrogate.ratio.sum(),
            ratio_max=torch.maximum(self.ratio_max, surrogate.ratio.max()),
            grad_norm=self.grad_norm,
            reference_kl=self.reference_kl + surrogate.kl.sum(),
            gradient_signal=self.gradient_signal,
            gradient_noise=self.gradient_noise,
        )

    def finish(self, pairs: int, grad_norm: Tensor, measured: tuple[Tensor, Tensor] | None = None) -> StepStats:
        """Divide the sums: the stats of a whole optimizer step of `pairs` samples × steps on all ranks.

        Args:
            measured: the gradient's signal and noise, where they are.
        """
        sums = ("approx_kl", "clip_fraction", "clipped_fraction", "ratio_mean", "reference_kl")
        means = {name: getattr(self, name) / pairs for name in sums}
        unknown = torch.full_like(self.loss, torch.nan)
        signal, noise = measured or (unknown, unknown)
        # an optimizer that is offloaded has its norm on the CPU
        grad_norm = grad_norm.to(self.loss.device)
        return replace(self, **means, grad_norm=grad_norm, gradient_signal=signal, gradient_noise=noise)


def summarise(steps: Sequence[StepStats]) -> dict[str, float | None]:
    """Average an iteration's optimizer steps (the largest for ratio_max), in one copy from the device.

    Ranks are added up, but for the norm, which is the same on all, and ratio_max. No step made: no numbers.
    """
    names = [f.name for f in fields(StepStats)]
    if not steps:
        return dict.fromkeys(name for name in names if name not in MEASURED)
    here = torch.stack([torch.stack([getattr(step, name).float() for name in names]) for step in steps])
    ranks = comm.gather_rows(here[None])
    largest, mean = ranks.amax((0, 1)), ranks.sum(0).mean(0)
    values = torch.stack([mean, largest, here.mean(0)]).tolist()
    row = {"ratio_max": 1, **dict.fromkeys(("grad_norm", *MEASURED), 2)}
    numbers = {name: values[row.get(name, 0)][i] for i, name in enumerate(names)}
    return {name: value for name, value in numbers.items() if name not in MEASURED or math.isfinite(value)}


def iteration_record(
    steps: Sequence[StepStats],
    rewards: Mapping[int, GroupRewards],
    advantages: Mapping[int, Tensor],
    windows: Sequence[Window],
    *,
    referred: bool = False,
) -> dict[str, Any]:
    """The numbers of one iteration's line of metrics.jsonl, less its counters and seconds.

    Args:
        steps: one per optimizer step that was made; rewards: of all groups; windows: in the order of the groups.
        advantages: of the groups that were not skipped.
        referred: whether the loss has a term of the pretrained model.
    """
    # a sample without peers has none
    all_advantages = torch.cat([values.flatten() for values in advantages.values()] or [torch.zeros(1)])
    by_group = [group.rewards for group in rewards.values() if group.rewards is not None]
    all_rewards = torch.cat(by_group)
    spreads = [values.std() for values in by_group if len(values) > 1]
    terms = [group.terms for group in rewards.values() if group.rewards is not None]
    term_means = {name: sum(group[name] for group in terms) / len(terms) for name in terms[0]}
    prompts = [group.prompt for group in rewards.values()]
    summary = summarise(steps)
    if not referred:
        del summary["reference_kl"]
    return {
        "reward_mean": float(all_rewards.mean()),
        "reward_std": _std(all_rewards),
        "reward_min": float(all_rewards.min()),
        "reward_max": float(all_rewards.max()),
        **({f"reward/{name}": value for name, value in term_means.items()} if len(term_means) > 1 else {}),
        "advantage_std": _std(all_advantages),
        "advantage_max": float(all_advantages.abs().max()),
        # a group of one has no spread
        "group_reward_std": float(torch.stack(spreads).mean()) if spreads else None,
        "flat_groups": sum(not bool(a.any()) for a in advantages.values()) / len(advantages) if advantages else None,
        **summary,
        **({"prompts": prompts} if any(prompts) else {}),
        "window_starts": [window.start for window in windows],
        "window_stops": [window.stop for window in windows],
        "window_steps": sum(len(window) for window in windows),
    }


def _std(values: Tensor) -> float:
    """Unbiased standard deviation; 0 for a single value, whose own would be NaN."""
    return float(values.std()) if len(values) > 1 else 0.0
