"""Stopping: rules that watch the lines of a run, and that may end it.

Every rule is a function of the lines of metrics.jsonl and evaluations.jsonl: a run that resumes reads them again and
stands where it stood. What a rule finds is an event with its figures; `stop.on_collapse` says what follows.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hrf_fast.config.run_options import StopConfig
from hrf_fast.evaluation.diversity import paired_difference_interval

FLOOR = 0.6
"""Share of the pretrained model's metric that a floor left open stands for, where the panel measures that metric."""
SPIKES, NORMS = 3, (10, 50)
"""A gradient norm has left its median after so many iterations in a row; its median is of so many, least and most."""


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl."""

    iteration: int
    """Iterations done when it happened."""
    event: str
    """diversity, quality, target, patience, ratio_max, clip_fraction, approx_kl, grad_norm, not_finite, error, changed
    or end."""
    text: str
    figures: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Budget:
    """The end that the configuration sets: a number of iterations, or of network evaluations if that comes first."""

    iterations: int
    max_evaluations: int = 0
    """The run stops after the iteration in which the evaluations pass this number; 0 sets no such end."""

    def reached(self, iteration: int, evaluations: int) -> str | None:
        """The reason to stop after `iteration` iterations, or None to go on."""
        if 0 < self.max_evaluations <= evaluations:
            return f"stop.max_evaluations is {self.max_evaluations}"
        return f"train.iterations is {self.iterations}" if iteration >= self.iterations else None

    @property
    def unit(self) -> tuple[str, int]:
        """The unit that progress is shown in, and how many of it there will be."""
        return ("evaluations", self.max_evaluations) if self.max_evaluations else ("iterations", self.iterations)


def floors(stop: StopConfig, shares: Collection[str]) -> dict[str, tuple[str, float]]:
    """The metric of every floor: the option that sets it, and the share; `shares` are the metrics that have one."""
    options = {
        stop.diversity: ("stop.diversity_floor", stop.diversity_floor),
        stop.quality: ("stop.quality_floor", stop.quality_floor),
    }
    chosen = {name: (option, FLOOR if value is None else value) for name, (option, value) in options.items()}
    return {name: (option, value) for name, (option, value) in chosen.items() if value and name in shares}


def check_floors(stop: StopConfig, shares: Collection[str]) -> None:
    """Refuse a floor under a metric that the panel does not measure.

    Args:
        shares: `Panel.shares`.

    Raises:
        ValueError: a floor that is set, or an answer to a collapse that nothing would show.
    """
    any_network = "name an evaluation.network that gives it, and show it at least 8 images (or prompts)"
    with_classes = (
        "name an evaluation.network with classes (a shipped one, or an image classifier of the hub) and show it at "
        "least 8 images, or watch stop.quality=precision, which any network gives"
    )
    diversity, quality = ("diversity_floor", stop.diversity_floor), ("quality_floor", stop.quality_floor)
    for metric, (option, value) in {stop.diversity: diversity, stop.quality: quality}.items():
        way_out = with_classes if metric == "inception" else any_network
        if value and metric not in shares:
            raise ValueError(
                f"stop.{option} is {value:g}, a share of the pretrained model's {metric}, which the panel does not "
                f"measure; {way_out}, or set stop.{option}=0"
            )
        chosen = option.removesuffix("_floor")
        if value is None and metric not in shares and metric != getattr(StopConfig(), chosen):
            raise ValueError(
                f"stop.{chosen} is {metric}, which the panel does not measure, so nothing would watch; {way_out}, or "
                f"set stop.{option}=0"
            )
    if stop.on_collapse != "warn" and stop.diversity_floor is None and stop.diversity not in shares:
        raise ValueError(
            f"stop.on_collapse is {stop.on_collapse}, but the panel does not measure {stop.diversity}, so a collapse "
            f"would not show; {any_network}, or set stop.diversity_floor=0 to do without"
        )


def check_first_panel(stop: StopConfig, record: dict[str, Any]) -> None:
    """Refuse a floor that no panel can fall under: scores are at least 1, for images that are all alike.

    A panel's precision, which is no score, can fall to 0.

    Raises:
        ValueError: a floor that is set, or on whose account the run would be stopped.
    """
    for metric, (option, floor) in floors(stop, record).items():
        value = record[metric][0]
        certain = getattr(stop, option.removeprefix("stop.")) is not None
        certain = certain or (metric == stop.diversity and stop.on_collapse != "warn")
        if certain and floor * value <= 1:
            raise ValueError(
                f"{option} is {floor:g}, but the pretrained model's {metric} is {value:.3g} and none is under 1, so "
                "that no panel could fall under the floor; use a higher floor, a larger evaluation.panel_size, another "
                f"evaluation.network, or {option}=0"
            )


def unwatched_note(stop: StopConfig, record: dict[str, Any], shares: Collection[str]) -> str:
    """A line where the first panel has a diversity, and no later panel would be seen to lose it; else empty.

    Args:
        record: of the first panel; shares: the metrics of which later panels have a share.
    """
    metric = stop.diversity
    _, floor = floors(stop, record).get(metric, ("", 0.0))
    if not floor:
        return ""
    if metric not in shares:
        why = "halves of so few images say nothing of its share: use an evaluation.panel_size of at least 8"
    elif floor * (value := record[metric][0]) <= 1:
        why = f"{floor:g} of the pretrained model's {value:.3g} is under 1, which no panel is: use more images"
    else:
        return ""
    return f"nothing watches {metric}: {why}, or stop.diversity_floor=0 to do without"


def above_floors(record: dict[str, Any], stop: StopConfig) -> bool:
    """Whether a panel keeps at least the share of every floor; the pretrained model's does."""
    shares = record.get("kept", {})
    return all(shares[metric][0] >= floor for metric, (_, floor) in floors(stop, shares).items())


def by_merit(panels: Sequence[dict[str, Any]], stop: StopConfig) -> list[dict[str, Any]]:
    """The panels above all floors, the highest mean reward first and the earlier of equal ones."""
    return sorted((panel for panel in panels if above_floors(panel, stop)), key=lambda panel: -panel["reward"][0])


class StopRules:
    """The rules of a run's `stop` section, told every line in the order in which it is logged."""

    def __init__(self, stop: StopConfig, *, seed: int) -> None:
        """`seed` is that of the panels' bootstrap."""
        self._stop, self._seed = stop, seed
        self.ending: str | None = None
        """Why the run is to end after the lines so far, or None to go on."""
        self._holding: set[str] = set()
        self._norms: deque[float] = deque(maxlen=NORMS[1])
        self._spikes = self._stale = 0
        # the panel that the next gain is measured from
        self._best: dict[str, Any] | None = None

    def panel(self, record: dict[str, Any]) -> list[Event]:
        """The events that a line of evaluations.jsonl brings."""
        events = [*self._collapses(record), *self._target(record), *self._stale_reward(record)]
        return self._new(events, {"diversity", "quality", "target", "patience"})

    def iteration(self, record: dict[str, Any]) -> list[Event]:
        """The events that a line of metrics.jsonl brings."""
        # a panel is of the iteration before it
        self.ending = None
        events = [*self._beyond(record), *self._gradient(record)]
        if record.get("skipped_steps"):
            text = f"{record['skipped_steps']} optimizer steps were skipped: a reward or gradient was not finite"
            events.append(self._event(record, "not_finite", text, skipped_steps=record["skipped_steps"]))
        return self._new(events, {"ratio_max", "clip_fraction", "approx_kl", "grad_norm", "not_finite"})

    def _new(self, events: list[Event], watched: set[str]) -> list[Event]:
        """Return the events of rules that did not hold before; what holds may end the run at every line."""
        for event in events:
            if event.event in ("target", "patience") or (
                self._stop.on_collapse != "warn" and event.event != "not_finite"
            ):
                self.ending = self.ending or event.text
        new = [event for event in events if event.event not in self._holding]
        self._holding = self._holding - watched | {event.event for event in events}
        return new

    def _event(self, record: dict[str, Any], name: str, text: str, **figures: float) -> Event:
        # a line of metrics.jsonl has the iterations before its own
        done = record["iteration"] + ("rewards" not in record)
        return Event(done, name, text, figures)

    def _collapses(self, record: dict[str, Any]) -> Iterator[Event]:
        """A metric has collapsed where the whole interval of its share is under the floor."""
        shares = record.get("kept", {})
        for metric, (option, floor) in floors(self._stop, shares).items():
            value, low, high = shares[metric]
            if high < floor:
                name = "quality" if metric == self._stop.quality else "diversity"
                text = f"{metric} is {value:.3g} [{low:.3g}, {high:.3g}] of the pretrained model's, under {option}"
                yield self._event(record, name, f"{text} {floor:g}", kept=value, low=low, high=high, floor=floor)

    def _target(self, record: dict[str, Any]) -> Iterator[Event]:
        """The panel's mean reward at or over the target."""
        reward, target = record["reward"][0], self._stop.target_reward
        if target is not None and reward >= target:
            text = f"the panel's reward is {reward:.4g}, at least stop.target_reward {target:g}"
            yield self._event(record, "target", text, reward=reward, target=target)

    def _stale_reward(self, record: dict[str, Any]) -> Iterator[Event]:
        """Panels since the last whose gain over the best before it, paired image by image, is beyond its interval."""
        if not self._stop.patience:
            return
        if self._best is None:
            self._best = record
            return
        pair = [torch.tensor(panel["rewards"], dtype=torch.float64) for panel in (self._best, record)]
        gain = paired_difference_interval(*pair, seed=self._seed)
        if gain.low > 0:
            self._best, self._stale = record, 0
            return
        self._stale += 1
        if self._stale >= self._stop.patience:
            since = self._best["iteration"]
            text = f"{self._stale} panels without a gain of the reward beyond its interval since iteration {since}; "
            text += f"stop.patience is {self._stop.patience}"
            yield self._event(record, "patience", text, panels=self._stale, since=since, **gain._asdict())

    def _beyond(self, record: dict[str, Any]) -> Iterator[Event]:
        """Statistics of the update over their limits; NaN is over every one."""
        options = {"ratio_max": "max_ratio", "clip_fraction": "max_clip_fraction", "approx_kl": "max_kl"}
        for name, option in options.items():
            value, limit = record.get(name), getattr(self._stop, option)
            if value is not None and limit and not value <= limit:
                text = f"{name} is {value:.3g}, over stop.{option} {limit:g}"
                yield self._event(record, name, text, value=value, limit=limit)

    def _gradient(self, record: dict[str, Any]) -> Iterator[Event]:
        """A gradient norm far over the median of the run's own (as AutoClip, arXiv 2007.14469, judges by history)."""
        norm, factor = record.get("grad_norm"), self._stop.max_norm_factor
        if norm is None or not factor:
            return
        known = len(self._norms) >= NORMS[0]
        median = statistics.median(self._norms) if known else norm
        self._spikes = self._spikes + 1 if known and norm > factor * median else 0
        self._norms.append(norm)
        if self._spikes >= SPIKES:
            text = f"grad_norm is {norm:.3g}, over {factor:g} times its median {median:.3g} (stop.max_norm_factor) for "
            yield self._event(record, "grad_norm", f"{text}{self._spikes} iterations", value=norm, median=median)
