"""What the searches of HRF-D choose from what was measured, and what their choices lose.

The rules and yardsticks are those of bench_search.py, which measures.
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
from hrf_fast.windows.rule import start_scores
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

    def scores(self, anchor: int, groups: Sequence[int]) -> Tensor:
        """Exact scores [C − 1] by several groups together."""
        rewards, distances = self.tables["exact"][anchor][list(groups)].double().mean(0)
        return start_scores(rewards.diff(), distances[1:], beta=self.arguments.beta)

    def probe(self, places: Sequence[tuple[int, int]], spent: list[int]) -> Callable[..., list[tuple[Tensor, Tensor]]]:
        """A probe that looks up what was measured of (anchor, group), and lists what it would have cost a sample."""

        def probe(candidates: Sequence[Sequence[int]], *, estimate: str = "exact") -> list[tuple[Tensor, Tensor]]:
            found = []
            for (anchor, group), starts in zip(places, candidates, strict=True):
                spent.append(sum(evaluations(start, self.arguments.steps, estimate) for start in starts))
                rewards, distances = self.tables[estimate][anchor][group]
                columns = [self.candidates.index(start) for start in starts]
                found.append((rewards[columns], distances[columns]))
            return found

        return probe


def make(arguments: argparse.Namespace, name: str) -> Any:
    kwargs = SEARCHES[name] | {"stride": arguments.stride, "beta": arguments.beta}
    return build_schedule("dynamic", kwargs, num_inference_steps=arguments.steps, stop=arguments.steps - 1)


def choose(measured: Measurements, name: str, anchor: int, group: int) -> tuple[list[int], list[int]]:
    """The starts that a search chooses for one anchor from one group's noise, and evaluations per sample of each."""
    arguments, found, spent = measured.arguments, [], []
    remembers = SEARCHES[name]["search"] == "bandit"
    others = [place for place in range(len(measured)) if place != anchor]
    for repeat in range(arguments.repeats if remembers else 1):
        schedule = make(arguments, name)
        for iteration in range(arguments.warmup if remembers else 0):
            draw = noise_generator(arguments.seed + 1 + repeat, iteration, "windows")
            drawn = torch.randint(len(others), (arguments.groups,), generator=draw)
            groups = torch.randint(arguments.noises, (arguments.groups,), generator=draw)
            places = [(others[int(a)], int(g)) for a, g in zip(drawn, groups, strict=True)]
            schedule(iteration, len(places), generator=draw, probe=measured.probe(places, []))
        draw = noise_generator(arguments.seed + 1 + repeat, arguments.warmup, "windows")
        (window,) = schedule(arguments.warmup, 1, generator=draw, probe=measured.probe([(anchor, group)], spent))
        found.append(window.start)
    return found, spent


def judge(measured: Measurements, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The rows of the table."""
    arguments, candidates = measured.arguments, measured.candidates
    groups, anchors = range(arguments.noises), range(len(measured))
    everywhere = torch.stack([measured.scores(anchor, list(groups)) for anchor in anchors])
    chosen: dict[str, list[list[list[int]]]] = {}
    spent: dict[str, list[int]] = {}
    for name in SEARCHES:
        both = [[choose(measured, name, anchor, group) for group in groups] for anchor in anchors]
        chosen[name] = [[starts for starts, _ in of_anchor] for of_anchor in both]
        spent[name] = [cost for of_anchor in both for _, costs in of_anchor for cost in costs]
    chosen["uniform"] = [[candidates[:-1] for _ in groups] for _ in anchors]
    best = [int((everywhere.sum(0) - everywhere[anchor]).argmax()) for anchor in anchors]
    chosen["one start"] = [[[candidates[best[anchor]]] for _ in groups] for anchor in anchors]
    regrets, rows = {}, []
    for name, starts in chosen.items():
        regret, same = torch.zeros(2, len(measured), dtype=torch.float64)
        for anchor in anchors:
            for group in groups:
                others = [other for other in groups if other != group]
                scores = measured.scores(anchor, others)
                picks = [candidates.index(start) for start in starts[anchor][group]]
                regret[anchor] += float((scores.max() - scores[picks]).mean()) / len(groups)
                hits = [start == chosen["exact"][anchor][o][0] for start in starts[anchor][group] for o in others]
                same[anchor] += statistics.fmean(hits) / len(groups)
        regrets[name] = regret
        every = [start for of_anchor in starts for of_group in of_anchor for start in of_group]
        rows.append(
            {
                "name": name,
                "evaluations_per_sample": statistics.fmean(spent[name]) if name in spent else 0.0,
                "seconds_per_sample": statistics.median(seconds[name]) if seconds.get(name) else None,
                "same_start": float(same.mean()),
                "regret": list(mean_interval(regret, seed=arguments.seed)),
                "over_exact": list(paired_difference_interval(regrets["exact"], regret, seed=arguments.seed)),
                "mean_start": statistics.fmean(every),
                "starts": {start: every.count(start) for start in sorted(set(every))},
                "regret_of_anchors": regret.tolist(),
            }
        )
    return rows
