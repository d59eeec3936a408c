"""Window, and the protocols of what chooses one: a window schedule, and the probe that it may measure starts by.

`register_schedule` adds a schedule; what several of them draw and check is here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from hrf_fast.registry import Registry, check_count, nearest

# network evaluations per sample that measuring a start takes, by how it is measured
_COSTS: dict[str, Callable[[int, int], int]] = {
    "exact": lambda start, num_steps: num_steps - start,
    "x0": lambda start, num_steps: 1,
}
ESTIMATES = tuple(_COSTS)


@dataclass(frozen=True)
class Window:
    """Denoising steps [start, stop), step 0 the noisiest; never empty."""

    start: int
    stop: int
    deterministic: bool = False
    """Whether the steps around the window are deterministic: those after it, and those from pure noise to it where the
    schedule has no anchors. Otherwise the steps after it are the sampler's."""
    shared: bool = False
    """Whether the group's samples start from one noise, and so share the deterministic steps before the window."""

    def __post_init__(self) -> None:
        # numpy's and torch's are refused too: a log has starts as JSON
        if type(self.start) is not int or type(self.stop) is not int:
            raise ValueError(f"window [{self.start!r}, {self.stop!r}) is not of ints; use int(start) and int(stop)")
        if not 0 <= self.start < self.stop:
            raise ValueError(f"window [{self.start}, {self.stop}) is empty or negative; use 0 <= start < stop")

    def __len__(self) -> int:
        return self.stop - self.start


class Probe(Protocol):
    """(candidate starts of each group) -> per group their mean rewards and mean distances to the anchor, both [C].

    On the CPU and the same on every rank. `estimate` is exact or x0, see `hrf_fast.training.probe`.
    """

    def __call__(
        self, candidates: Sequence[Sequence[int]], *, estimate: str = "exact"
    ) -> list[tuple[Tensor, Tensor]]: ...


class WindowSchedule(Protocol):
    """Chooses one window per group; `needs_anchors` is False where groups start from pure noise (DDPO).

    `shortest`, where there is one, is the window of least share of the T steps, by which clips are scaled. A schedule
    that remembers has two more methods: `state()` gives what a checkpoint keeps as JSON-able values, and
    `load_state(state)` restores it.
    """

    needs_anchors: bool

    def __call__(self, iteration: int, num_groups: int, *, generator: Generator, probe: Probe) -> list[Window]: ...


Factory = Callable[..., WindowSchedule]
SCHEDULES: Registry[Factory] = Registry("window schedule", "window.schedule")
register_schedule = SCHEDULES.register


def with_noise(windows: Sequence[Window], shared: bool | None) -> list[Window]:
    """The windows with `shared` as window.shared_noise has it; None leaves them as they are."""
    return [*windows] if shared is None else [replace(window, shared=shared) for window in windows]


def check_estimate(estimate: str) -> str:
    """Return `estimate` if a probe measures by it.

    Raises:
        ValueError: no probe does; the message lists the estimates.
    """
    if estimate not in ESTIMATES:
        raise ValueError(
            f"the probe's estimate is {estimate!r}{nearest(estimate, ESTIMATES)}; use one of {', '.join(ESTIMATES)}"
        )
    return estimate


def evaluations(start: int, num_steps: int, estimate: str = "exact") -> int:
    """Network evaluations per sample that measuring one candidate takes."""
    return _COSTS[check_estimate(estimate)](start, num_steps)


def draw_starts(starts: Sequence[int], count: int, generator: Generator) -> list[int]:
    """Uniform draws with replacement, one per group."""
    return [starts[int(i)] for i in torch.randint(len(starts), (count,), generator=generator)]


def check_width(width: Any, stop: int) -> None:
    """Refuse a window.kwargs.width that is no number of steps before `stop`.

    Raises:
        ValueError: names the option and its value.
    """
    check_count("window.kwargs.width", width)
    if width > stop:
        raise ValueError(f"window.kwargs.width is {width}, but {stop} steps can be trained; use at most that")


def check_number(name: str, value: Any, low: float, high: float, advice: str) -> None:
    """Refuse a window.kwargs.`name` that is no finite number in [low, high].

    Raises:
        ValueError: names the option and its value, and gives the advice.
    """
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"window.kwargs.{name} is {value!r}; use {advice}")
