"""Bandit: HRF-D's criterion over a few measurements an iteration and what earlier ones have shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator

from hrf_fast.registry import check_count
from hrf_fast.windows.base import ESTIMATES, Probe, Window, check_number
from hrf_fast.windows.criterion import start_criterion


class Bandit:
    """HRF-D's criterion over running means that discounted UCB keeps fresh (Garivier and Moulines, arXiv 0805.3415).

    Arms are the candidates but the last. A pull of arm i measures, on one group's anchor and with the same noise, the
    change in reward from candidate i to i + 1 and the distance of candidate i + 1. Sums and counts are multiplied by
    `discount` once per iteration, as the weights change. Each group pulls the `pulls` arms of greatest
    criterion_i + exploration·sqrt(log Σ N / N_i), N the discounted counts: groups choose one after the other, counting
    the pulls of the groups before them, and arms never tried come first, in random order.

    All groups of the iteration then train from the arm of the greatest criterion, by the means of all tried arms. That
    need not be an arm that was pulled: to measure a start costs the same whether it is trained or not.
    """

    needs_anchors = True

    def __init__(
        self,
        candidates: Sequence[int],
        stop: int,
        *,
        beta: float,
        estimate: str,
        pulls: int,
        discount: float,
        exploration: float,
    ) -> None:
        self.candidates, self.stop, self.beta = list(candidates), stop, beta
        self.shortest = Window(self.candidates[-2], stop)
        self.estimate, self.pulls, self.discount, self.exploration = estimate, pulls, discount, exploration
        arms = len(self.candidates) - 1
        if estimate not in ESTIMATES:
            raise ValueError(f"window.kwargs.estimate is {estimate!r}; use {' or '.join(ESTIMATES)}")
        check_count("window.kwargs.pulls", pulls)
        if pulls > arms:
            raise ValueError(f"window.kwargs.pulls is {pulls}; a group has {arms} starts to choose from, use fewer")
        # the smallest float above 0
        check_number("discount", discount, math.ulp(0.0), 1, "a number above 0, at most 1 (1 forgets nothing)")
        check_number("exploration", exploration, 0, math.inf, "a finite number of at least 0")
        # per arm, discounted: pulls, and the sums of what they measured
        self.counts, self.changes, self.distances = [0.0] * arms, [0.0] * arms, [0.0] * arms

    def __call__(self, iteration: int, num_groups: int, *, generator: Generator, probe: Probe) -> list[Window]:
        for sums in (self.counts, self.changes, self.distances):
            sums[:] = [self.discount * value for value in sums]
        pulled = self._choose(num_groups, generator)
        # neighbouring arms share a candidate
        asked = [sorted({arm + side for arm in arms for side in (0, 1)}) for arms in pulled]
        measured = probe([[self.candidates[i] for i in indices] for indices in asked], estimate=self.estimate)
        for arms, indices, (rewards, distances) in zip(pulled, asked, measured, strict=True):
            reward, distance = (dict(zip(indices, values.tolist(), strict=True)) for values in (rewards, distances))
            for arm in arms:
                self.counts[arm] += 1
                self.changes[arm] += reward[arm + 1] - reward[arm]
                self.distances[arm] += distance[arm + 1]
        criterion = self._criterion()
        best = max(criterion, key=lambda arm: criterion[arm])
        return [Window(self.candidates[best], self.stop)] * num_groups

    def _choose(self, num_groups: int, generator: Generator) -> list[list[int]]:
        """The arms that each group pulls."""
        criterion, counts = self._criterion(), list(self.counts)
        order = torch.randperm(len(counts), generator=generator).tolist()

        def index(arm: int) -> float:
            if counts[arm] == 0:
                return math.inf
            # an arm whose first result is not there yet counts as an average one
            bonus = self.exploration * math.sqrt(math.log(max(sum(counts), 1.0)) / counts[arm])
            return criterion.get(arm, 0.0) + bonus

        pulled = []
        for _ in range(num_groups):
            arms: list[int] = []
            for _ in range(self.pulls):
                arm = max((arm for arm in order if arm not in arms), key=index)
                arms.append(arm)
                counts[arm] += 1
            pulled.append(arms)
        return pulled

    def _criterion(self) -> dict[int, float]:
        """HRF-D's criterion of every arm that was tried."""
        tried = [arm for arm, count in enumerate(self.counts) if count > 0]
        if not tried:
            return {}
        sums = torch.tensor([self.changes, self.distances], dtype=torch.float64)[:, tried]
        changes, distances = sums / torch.tensor(self.counts, dtype=torch.float64)[tried]
        return dict(zip(tried, start_criterion(changes, distances, beta=self.beta).tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """The JSON-able memory, for a checkpoint."""
        return {"counts": list(self.counts), "changes": list(self.changes), "distances": list(self.distances)}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.counts, self.changes, self.distances = (list(state[name]) for name in ("counts", "changes", "distances"))
