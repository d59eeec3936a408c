"""Counts: network calls that a configuration's own window schedule asks for, an iteration on average."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hrf_fast.config.options import Config
from hrf_fast.noise import noise_generator
from hrf_fast.windows.base import evaluations, with_noise
from hrf_fast.windows.schedules import build_schedule


@dataclass(frozen=True)
class CallCounts:
    """Images through the network per iteration over all GPUs, a guided one counting two; the mean over the run."""

    anchors: float
    """Anchors, or the deterministic steps that lead to windows."""
    search: float
    rollout: float
    update: float
    longest_window: int
    """In steps."""
    reference: float = 0.0
    """Through the pretrained model, where the loss has a term of it."""

    def forwards(self, mode: str, inner_epochs: int) -> float:
        """Forwards without those that checkpointing repeats; `keep` needs none in the first epoch of the update."""
        sampled = self.anchors + self.search + self.rollout + self.reference
        return sampled + self.update * (inner_epochs - (mode == "keep"))

    def evaluations(self, mode: str, inner_epochs: int) -> float:
        """Evaluations as a run counts them and stop.max_evaluations means them: forwards, a backward counting two."""
        return self.forwards(mode, inner_epochs) + 2 * self.update * inner_epochs

    def repeated(self, mode: str, inner_epochs: int) -> float:
        """Forwards that checkpointing makes again in backwards, which no run counts."""
        return self.update * inner_epochs if mode == "checkpoint" else 0.0


def count_calls(
    config: Config, stop: int, schedule: str | Callable[..., Any] | None = None, *, branches: int
) -> CallCounts:
    """Run a window schedule of the configuration's (or another one) over the run's iterations, 1000 at most, and count.

    It is a schedule of its own: what it is shown here must not get into the run's memory.

    The search of a schedule that probes (HRF-D) is counted as it asks; what it would measure is not known before the
    run, so random numbers stand in for it: exact for exact and x0, and for a bandit as many candidates as in the run,
    but not the same ones. `branches` are those of a call in training, see `Condition`.
    """
    train, steps = config.train, config.sample.num_inference_steps
    windows = build_schedule(
        schedule or config.window.schedule, config.window.kwargs, num_inference_steps=steps, stop=stop
    )
    stand_in = torch.Generator().manual_seed(config.run.seed)
    iterations = min(train.iterations, 1000)
    groups, size = train.groups_per_iteration, train.group_size
    searched, lengths, run_steps, referred, led = 0, [], 0, 0, 0
    last_referred = config.remedies.referred_steps(steps)

    def probe(candidates: Sequence[Sequence[int]], *, estimate: str = "exact") -> list[tuple[Tensor, Tensor]]:
        nonlocal searched
        searched += sum(evaluations(start, steps, estimate) for starts in candidates for start in starts) * size
        return [
            (torch.rand(len(starts), generator=stand_in), torch.rand(len(starts), generator=stand_in))
            for starts in candidates
        ]

    for iteration in range(iterations):
        generator = noise_generator(config.run.seed, iteration, "windows")
        chosen = windows(iteration, groups, generator=generator, probe=probe)
        for window in with_noise(chosen, config.window.shared_noise):
            lengths.append(len(window))
            run_steps += steps - window.start
            if window.deterministic and not windows.needs_anchors:
                led += window.start * (1 if window.shared else size)
            referred += max(0, min(window.stop, last_referred) - window.start)
    # anchors are drawn in the first of every `anchor_reuse` iterations
    draws = math.ceil(iterations / config.window.anchor_reuse) / iterations
    drawn = groups * (config.window.anchor_steps or steps) * draws
    return CallCounts(
        anchors=branches * (drawn if windows.needs_anchors else led / iterations),
        search=branches * searched / iterations,
        rollout=branches * run_steps * size / iterations,
        update=branches * train.step_share * sum(lengths) * size / iterations,
        longest_window=stop if searched else max(lengths),
        reference=branches * referred * size / iterations,
    )
