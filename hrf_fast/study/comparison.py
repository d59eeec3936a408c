"""Comparison: a measure of one arm's runs against the reference's, paired over training seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hrf_fast.study.statistics import (
    Estimate,
    Paired,
    diversity_at_gain,
    estimate,
    evaluations_to_gain,
    gain_at_diversity,
    hypervolume,
    paired,
    path_of,
    ratio,
    seconds_to_gain,
)

Lines = Mapping[int, Mapping[str, Any]]
"""Lines of one arm by seed."""


class Measure(NamedTuple):
    """A number that each run of two arms comes to, at a level that is common to both arms."""

    title: str
    kind: str
    """How it is shown, a key of _SHOWN."""
    level: Callable[[Sequence[Mapping[str, Any]]], float | None]
    """From the lines of both arms; None where they have no common level."""
    value: Callable[[Mapping[str, Any], float], float | None]
    """From a line and the level; None where the run does not reach it."""


def measures(keep: float, target: float | None) -> list[Measure]:
    """The comparisons of a study; `target` is the gain that evaluations are counted to, None for a common one."""

    def highest_common(lines: Sequence[Mapping[str, Any]]) -> float | None:
        return _positive(min(max(point.gain for point in path_of(line)) for line in lines))

    def wanted(lines: Sequence[Mapping[str, Any]]) -> float | None:
        return target or highest_common(lines)

    def highest_within(lines: Sequence[Mapping[str, Any]]) -> float | None:
        return target or _positive(min(gain_at_diversity(path_of(line), keep) for line in lines))

    return [
        Measure(
            "gain with {level} kept", "gain", lambda _: keep, lambda line, _: gain_at_diversity(path_of(line), keep)
        ),
        Measure(
            "kept at gain {level}", "share", highest_common, lambda line, gain: diversity_at_gain(path_of(line), gain)
        ),
        Measure(
            f"evaluations to gain {{level}} with {percent(keep)} kept",
            "count",
            highest_within,
            lambda line, gain: evaluations_to_gain(path_of(line), gain, keep),
        ),
        Measure(
            f"seconds to gain {{level}} with {percent(keep)} kept",
            "count",
            highest_within,
            lambda line, gain: seconds_to_gain(line, gain, keep),
        ),
        Measure(
            "evaluations to gain {level}",
            "count",
            wanted,
            lambda line, gain: evaluations_to_gain(path_of(line), gain, 0.0),
        ),
        Measure("hypervolume", "area", lambda _: 0.0, lambda line, _: hypervolume(path_of(line))),
        Measure(
            "gain of the best panel with {level} kept",
            "gain",
            lambda _: keep,
            lambda line, _: max(point.gain for point in path_of(line) if point.kept >= keep),
        ),
    ]


def percent(share: float) -> str:
    """A floor in per cent, as it was written."""
    return f"{100 * share:g} %"


def _positive(gain: float) -> float | None:
    return gain if gain > 0 else None


class Compared(NamedTuple):
    """A measure of an arm against the reference."""

    title: str
    shared: int
    """Seeds that both arms have."""
    arm: Estimate | None
    reference: Estimate | None
    """Over the seeds where both runs have a value."""
    result: Paired | None
    """None too where a run has no value: those that have one are the quick ones, or the far ones."""
    loss: Estimate | None = None
    """Share lost over the reference's, where the measure is a share kept."""


def compare(arm: Lines, reference: Lines, measure: Measure) -> Compared | None:
    """Compare two arms on the seeds that both have; None without one."""
    seeds = [seed for seed in arm if seed in reference]
    if not seeds:
        return None
    level = measure.level([arms[seed] for arms in (arm, reference) for seed in seeds])
    if level is None:
        return Compared(measure.title.format(level="(none in common)"), len(seeds), None, None, None)
    title = measure.title.format(level=percent(level) if measure.kind == "gain" else f"{level:.4g}")
    values = [{seed: measure.value(arms[seed], level) for seed in seeds} for arms in (arm, reference)]
    both = [seed for seed in seeds if values[0][seed] is not None and values[1][seed] is not None]
    if not both:
        return Compared(title, len(seeds), None, None, None)
    ours, theirs = ({seed: float(one[seed] or 0) for seed in both} for one in values)
    means = [estimate(list(one.values())) for one in (ours, theirs)]
    losses = [[1 - share for share in one.values()] for one in (ours, theirs)]
    loss = ratio(*losses) if measure.kind == "share" else None
    result = paired(ours, theirs) if len(both) == len(seeds) else None
    return Compared(title, len(seeds), means[0], means[1], result, loss)
