"""Regret: the starts that HRF-D's searches choose from equal measurements, and what these choices lose.

bench_search.py explains the rules and the yardsticks.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hrf_fast.evaluation.diversity import mean_interval, paired_difference_interval
from hrf_fast.noise import noise_generator
from hrf_fast.windows.base import evaluations
from hrf_fast.windows.criterion import start_criterion
from hrf_fast.windows.schedules import build_schedule

SEARCHES: dict[str, dict[str, Any]] = {
    "exact": {"search": "exact"},
    "x0": {"search": "x0"},
    "bandit, exact": {"search": "bandit", "estimate": "exact"},
    "bandit, x0": {"search": "bandit", "estimate": "x0"},
}


class Measurements:
    """Mean reward and distance of every candidate, by anchor and group of noise: [anchors, groups, 2, C]."""

    def __init__(self, arguments: argparse.Namespace, candidates: list[int]) -> None:
        self.arguments, self.candidates = arguments, candidates
        self.tables: dict[str, list[Tensor]] = {"exact": [], "x0": []}

    def __len__(self) -> int:
        return len(self.tables["x0"])

    def criteria(self, anchor: int, groups: Sequence[int]) -> Tensor:
        """Exact criteria [C − 1] by several groups together."""
        rewards, distances = self.tables["exact"][anchor][list(groups)].double().mean(0)
        return start_criterion(rewards.diff(), distances[1:], beta=self.arguments.beta)

    def probe(self, pairs: Sequence[tuple[int, int]], spent: list[int]) -> Callable[..., list[tuple[Tensor, Tensor]]]:
        """A probe that looks up measurements by (anchor, group) and adds to `spent` what they would cost a sample."""

        def probe(candidates: Sequence[Sequence[int]], *, estimate: str = "exact") -> list[tuple[Tensor, Tensor]]:
            means = []
            for (anchor, group), starts in zip(pairs, candidates, strict=True):
                spent.append(sum(evaluations(start, self.arguments.steps, estimate) for start in starts))
                rewards, distances = self.tables[estimate][anchor][group]
                columns = [self.candidates.index(start) for start in starts]
                means.append((rewards[columns], distances[columns]))
            return means

        return probe


def make(arguments: argparse.Namespace, name: str) -> Any:
    """The window schedule of a search."""
    kwargs = SEARCHES[name] | {"stride": arguments.stride, "beta": arguments.beta}
    return build_schedule("dynamic", kwargs, num_inference_steps=arguments.steps, stop=arguments.steps - 1)


def choose(measured: Measurements, name: str, anchor: int, group: int) -> tuple[list[int], list[int]]:
    """The starts that a search chooses for one anchor from one group's noise, and evaluations per sample of each."""
    arguments, starts, spent = measured.arguments, [], []
    remembers = SEARCHES[name]["search"] == "bandit"
    others = [other for other in range(len(measured)) if other != anchor]
    for repeat in range(arguments.repeats if remembers else 1):
        schedule = make(arguments, name)
        for iteration in range(arguments.warmup if remembers else 0):
            draw = noise_generator(arguments.seed + 1 + repeat, iteration, "windows")
            drawn = torch.randint(len(others), (arguments.groups,), generator=draw)
            groups = torch.randint(arguments.noises, (arguments.groups,), generator=draw)
            pairs = [(others[int(a)], int(g)) for a, g in zip(drawn, groups, strict=True)]
            schedule(iteration, len(pairs), generator=draw, probe=measured.probe(pairs, []))
        draw = noise_generator(arguments.seed + 1 + repeat, arguments.warmup, "windows")
        (window,) = schedule(arguments.warmup, 1, generator=draw, probe=measured.probe([(anchor, group)], spent))
        starts.append(window.start)
    return starts, spent


def judge(measured: Measurements, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The rows of the table.

    Args:
        seconds: per sample, by search.
    """
    seed = measured.arguments.seed
    chosen, spent = _choices(measured)
    regrets = {name: _regret(measured, starts) for name, starts in chosen.items()}
    rows = []
    for name, starts in chosen.items():
        every = [start for anchor in starts for group in anchor for start in group]
        rows.append(
            {
                "name": name,
                "evaluations_per_sample": statistics.fmean(spent[name]) if name in spent else 0.0,
                "seconds_per_sample": statistics.median(seconds[name]) if seconds.get(name) else None,
                "same_start": _agreement(starts, chosen["exact"]),
                "regret": list(mean_interval(regrets[name], seed=seed)),
                "over_exact": list(paired_difference_interval(regrets["exact"], regrets[name], seed=seed)),
                "mean_start": statistics.fmean(every),
                "starts": {start: every.count(start) for start in sorted(set(every))},
                "regret_of_anchors": regrets[name].tolist(),
            }
        )
    return rows


# the starts that were chosen, by anchor and the group of noise that chose: of a bandit one per course
_Starts = list[list[list[int]]]


def _choices(measured: Measurements) -> tuple[dict[str, _Starts], dict[str, list[int]]]:
    """The starts of every search and yardstick, and the searches' evaluations per sample."""
    groups, anchors = range(measured.arguments.noises), range(len(measured))
    chosen: dict[str, _Starts] = {}
    spent: dict[str, list[int]] = {}
    for name in SEARCHES:
        both = [[choose(measured, name, anchor, group) for group in groups] for anchor in anchors]
        chosen[name] = [[starts for starts, _ in by_group] for by_group in both]
        spent[name] = [cost for by_group in both for _, costs in by_group for cost in costs]
    candidates = measured.candidates
    chosen["uniform"] = [[candidates[:-1] for _ in groups] for _ in anchors]
    criteria = torch.stack([measured.criteria(anchor, list(groups)) for anchor in anchors])
    best = (criteria.sum(0) - criteria).argmax(1)
    chosen["one start"] = [[[candidates[int(best[anchor])]] for _ in groups] for anchor in anchors]
    return chosen, spent


def _regret(measured: Measurements, starts: _Starts) -> Tensor:
    """[anchors] float64: the mean over the groups that chose, each judged by all other groups together."""
    groups = range(measured.arguments.noises)
    regret = torch.zeros(len(measured), dtype=torch.float64)
    for anchor, by_group in enumerate(starts):
        for group in groups:
            criteria = measured.criteria(anchor, [other for other in groups if other != group])
            picks = [measured.candidates.index(start) for start in by_group[group]]
            regret[anchor] += float((criteria.max() - criteria[picks]).mean()) / len(groups)
    return regret


def _agreement(starts: _Starts, exact: _Starts) -> float:
    """The share of choices equal to those of the exact search by another group."""
    shares = [
        statistics.fmean(start == other for start in chosen for other in _others(exact[anchor], group))
        for anchor, by_group in enumerate(starts)
        for group, chosen in enumerate(by_group)
    ]
    return statistics.fmean(shares)


def _others(by_group: list[list[int]], group: int) -> list[int]:
    return [starts[0] for other, starts in enumerate(by_group) if other != group]
