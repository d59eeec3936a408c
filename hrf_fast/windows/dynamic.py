"""HRF-D: windows that start where the reward changes most while the images stay near their anchor.

`Search` measures every candidate for every group, in every iteration; `Bandit` a few, and remembers. The measuring
itself is in `hrf_fast.training.probe`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Generator

from hrf_fast.registry import check_count, nearest
from hrf_fast.windows.bandit import Bandit
from hrf_fast.windows.base import ESTIMATES, Probe, Window, check_number, register_schedule
from hrf_fast.windows.criterion import select_start

SEARCHES = (*ESTIMATES, "bandit")
# window.kwargs of the bandit and what they are if not given; of 0.1, 1 and 3 the first explored with the least regret
_BANDIT: dict[str, Any] = {"estimate": "exact", "pulls": 1, "discount": 0.95, "exploration": 0.1}


@register_schedule("dynamic")
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

    The default search is exact: `hrf bench search` wants the upper end of a search's regret over exact under 0.1. It
    found 0.12 for the bandit, 0.77 for x0 and 0.22 for a uniform draw: see docs/windows.md.

    Args:
        search: what is measured. exact, as published: a deterministic denoising of the whole group from every
            candidate. x0: the one-step estimate of the clean image at every candidate, one network evaluation each.
            bandit: some candidates per group and iteration, over what earlier iterations measured; see `Bandit`.
        stride: spaces the candidates 0, stride, 2·stride, …
        beta: weight of the distance to the anchor.
        estimate: of the bandit: exact or x0; null for exact.
        pulls: of the bandit: candidates per group and iteration; null for 1.
        discount: of the bandit: weight of what was measured an iteration before; null for 0.95.
        exploration: of the bandit: weight of the bonus of what was rarely measured; null for 0.1.
    """
    check_count("window.kwargs.stride", stride)
    check_number("beta", beta, -math.inf, math.inf, "a finite number such as 0.5")
    candidates = list(range(0, stop, stride))
    if len(candidates) < 2:
        raise ValueError(f"window.kwargs.stride is {stride}: a search needs two candidates among {stop} steps")
    if search not in SEARCHES:
        hint = nearest(search, SEARCHES) if isinstance(search, str) else ""
        raise ValueError(f"window.kwargs.search is {search!r}{hint}; use one of {', '.join(SEARCHES)}")
    bandit_options = {"estimate": estimate, "pulls": pulls, "discount": discount, "exploration": exploration}
    bandit_options = {name: value for name, value in bandit_options.items() if value is not None}
    if search == "bandit":
        return Bandit(candidates, stop, beta=beta, **(_BANDIT | bandit_options))
    if bandit_options:
        name, value = next(iter(bandit_options.items()))
        raise ValueError(
            f"window.kwargs.{name} is {value!r}, which only search=bandit reads, and search is {search}; leave it out, "
            "or set window.kwargs.search=bandit"
        )
    return Search(candidates, stop, beta=beta, estimate=search)


class Search:
    """Every candidate of every group by one estimate; nothing is remembered."""

    needs_anchors = True

    def __init__(self, candidates: Sequence[int], stop: int, *, beta: float, estimate: str) -> None:
        self.candidates, self.stop, self.beta, self.estimate = list(candidates), stop, beta, estimate
        # the last candidate ends a difference and begins none
        self.shortest = Window(self.candidates[-2], stop)

    def __call__(self, iteration: int, num_groups: int, *, generator: Generator, probe: Probe) -> list[Window]:
        measured = probe([self.candidates] * num_groups, estimate=self.estimate)
        return [Window(select_start(self.candidates, *means, beta=self.beta), self.stop) for means in measured]
