"""HRF-D: windows that start where the reward changes most while the images stay near their anchor.

`Search` measures every candidate for every group, in every iteration; `Bandit` a few, and remembers. The measuring
itself is in search.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from hrf_fast.registry import check_count, nearest
from hrf_fast.trajectory import Window

SEARCHES = ("exact", "x0", "bandit")
# window.kwargs of the bandit and what they are if not given; of 0.1, 1 and 3 the first explored with the least regret
_BANDIT: dict[str, Any] = {"estimate": "exact", "pulls": 1, "discount": 0.95, "exploration": 0.1}


# UNet evaluations per sample that measuring a start takes, by how it is measured
_COSTS: dict[str, Callable[[int, int], int]] = {
    "exact": lambda start, num_steps: num_steps - start,
    "x0": lambda start, num_steps: 1,
}
ESTIMATES = tuple(_COSTS)


def check_estimate(estimate: str) -> str:
    """The estimate, if there is one of that name.

    Raises:
        ValueError: there is none; says which there are.
    """
    if estimate not in ESTIMATES:
        raise ValueError(
            f"the probe's estimate is {estimate!r}{nearest(estimate, ESTIMATES)}; use one of {', '.join(ESTIMATES)}"
        )
    return estimate


def evaluations(start: int, num_steps: int, estimate: str = "exact") -> int:
    """UNet evaluations per sample that measuring one candidate takes."""
    return _COSTS[check_estimate(estimate)](start, num_steps)


class Probe(Protocol):
    """(candidate starts of each group) -> per group their mean rewards and mean distances to the anchor, both [C].

    On the CPU and the same on every rank. `estimate` is exact or x0, see `hrf_fast.search`.
    """

    def __call__(
        self, candidates: Sequence[Sequence[int]], *, estimate: str = "exact"
    ) -> list[tuple[Tensor, Tensor]]: ...


def dynamic(
    *,
    num_inference_steps: int,
    stop: int,
    search: str = "exact",
    stride: int = 2,
    beta: float = 0.5,
    estimate: str | None = None,
    pulls: int | None = None,
    discount: float | None = None,
    exploration: float | None = None,
) -> Search | Bandit:
    """HRF-D (arXiv 2410.08315): per group, the start of greatest change in reward that stays near the anchor.

    `stride` spaces the candidates 0, stride, 2·stride, …; `beta` weighs the distance. `search` says what is measured:

    - exact: as published, a deterministic denoising of the whole group from every candidate;
    - x0: the one-step estimate of the clean image at every candidate, one UNet evaluation each;
    - bandit: `pulls` candidates per group and iteration, over what earlier iterations measured; see `Bandit`.

    The default is exact: `hrf bench search` wants the upper end of a search's regret over exact under 0.1. It found
    0.12 for the bandit, 0.77 for x0 and 0.22 for a uniform draw: see the README.
    """
    check_count("window.kwargs.stride", stride)
    _check_number("beta", beta, -math.inf, math.inf, "a finite number such as 0.5")
    candidates = list(range(0, stop, stride))
    if len(candidates) < 2:
        raise ValueError(f"window.kwargs.stride is {stride}: a search needs two candidates among {stop} steps")
    if search not in SEARCHES:
        hint = nearest(search, SEARCHES) if isinstance(search, str) else ""
        raise ValueError(f"window.kwargs.search is {search!r}{hint}; use one of {', '.join(SEARCHES)}")
    given = {"estimate": estimate, "pulls": pulls, "discount": discount, "exploration": exploration}
    given = {name: value for name, value in given.items() if value is not None}
    if search == "bandit":
        return Bandit(candidates, stop, beta=beta, **(_BANDIT | given))
    for name in given:
        raise ValueError(
            f"window.kwargs.{name} is {given[name]!r}, which only search=bandit reads, and search is {search}; "
            "leave it out or set window.kwargs.search=bandit"
        )
    return Search(candidates, stop, beta=beta, estimate=search)


class Search:
    """Every candidate of every group by one estimate; nothing is remembered."""

    needs_anchors = True

    def __init__(self, candidates: Sequence[int], stop: int, *, beta: float, estimate: str) -> None:
        self.candidates, self.stop, self.beta, self.estimate = list(candidates), stop, beta, estimate

    def __call__(self, iteration: int, num_groups: int, *, generator: Generator, probe: Probe) -> list[Window]:
        measured = probe([self.candidates] * num_groups, estimate=self.estimate)
        return [Window(select_start(self.candidates, *means, beta=self.beta), self.stop) for means in measured]


class Bandit:
    """HRF-D's rule over running means, which discounted UCB (Garivier and Moulines 2011, arXiv 0805.3415) keeps fresh.

    Arms are the candidates but the last. A pull of arm i measures, on one group's anchor and with the same noise, the
    change in reward from candidate i to i + 1 and the distance of candidate i + 1. Sums and counts are multiplied by
    `discount` once per iteration, as the weights change. Each group pulls the `pulls` arms of greatest
    score_i + exploration·sqrt(log Σ N / N_i), N the discounted counts: groups choose one after the other, counting what
    the ones before them have pulled, and arms never tried come first, in random order.

    All groups of the iteration then train from the arm of greatest score, by HRF-D's rule on the means of all tried
    arms. That is not the arm that was pulled: to measure a start costs the same whether it is trained or not.
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
        self.estimate, self.pulls, self.discount, self.exploration = estimate, pulls, discount, exploration
        arms = len(self.candidates) - 1
        if estimate not in ("exact", "x0"):
            raise ValueError(f"window.kwargs.estimate is {estimate!r}; use exact or x0")
        check_count("window.kwargs.pulls", pulls)
        if pulls > arms:
            raise ValueError(f"window.kwargs.pulls is {pulls}; a group has {arms} starts to choose from, use fewer")
        # the smallest float above 0
        _check_number("discount", discount, math.ulp(0.0), 1, "a number above 0, at most 1 (1 forgets nothing)")
        _check_number("exploration", exploration, 0, math.inf, "a finite number of at least 0")
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
        scores = self._scores()
        best = max(scores, key=lambda arm: scores[arm])
        return [Window(self.candidates[best], self.stop)] * num_groups

    def _choose(self, num_groups: int, generator: Generator) -> list[list[int]]:
        """The arms that each group pulls."""
        scores, counts = self._scores(), list(self.counts)
        order = torch.randperm(len(counts), generator=generator).tolist()

        def index(arm: int) -> float:
            if counts[arm] == 0:
                return math.inf
            # an arm whose first result is not there yet counts as an average one
            bonus = self.exploration * math.sqrt(math.log(max(sum(counts), 1.0)) / counts[arm])
            return scores.get(arm, 0.0) + bonus

        pulled = []
        for _ in range(num_groups):
            arms: list[int] = []
            for _ in range(self.pulls):
                arm = max((arm for arm in order if arm not in arms), key=index)
                arms.append(arm)
                counts[arm] += 1
            pulled.append(arms)
        return pulled

    def _scores(self) -> dict[int, float]:
        """HRF-D's score of every arm that was tried."""
        tried = [arm for arm, count in enumerate(self.counts) if count > 0]
        if not tried:
            return {}
        sums = torch.tensor([self.changes, self.distances], dtype=torch.float64)[:, tried]
        changes, distances = sums / torch.tensor(self.counts, dtype=torch.float64)[tried]
        return dict(zip(tried, start_scores(changes, distances, beta=self.beta).tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"counts": list(self.counts), "changes": list(self.changes), "distances": list(self.distances)}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.counts, self.changes, self.distances = (list(state[name]) for name in ("counts", "changes", "distances"))


def select_start(candidates: Sequence[int], rewards: Tensor, distances: Tensor, *, beta: float) -> int:
    """HRF-D's rule: argmax of Δ̂_i − β·d̂_i with Δ_i = r_{i+1} − r_i and d_i the distance of candidate i+1.

    Args:
        candidates: C starts; rewards, distances: [C] mean reward and mean 1 − cosine to the anchor of each.

    Returns:
        The chosen start, never the last candidate. Both lists are min-max normalised; a constant one counts as zeros.
    """
    scores = start_scores(rewards.double().diff(), distances.double()[1:], beta=beta)
    return candidates[int(scores.argmax())]


def start_scores(changes: Tensor, distances: Tensor, *, beta: float) -> Tensor:
    """Δ̂ − β·d̂ [C − 1] of the starts that can be chosen, both min-max normalised."""
    return _min_max(changes) - beta * _min_max(distances)


def _min_max(values: Tensor) -> Tensor:
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else torch.zeros_like(values)


def _check_number(name: str, value: Any, low: float, high: float, rule: str) -> None:
    """A finite number in [low, high]."""
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"window.kwargs.{name} is {value!r}; use {rule}")
