"""Statistics of a study: what a run's path comes to, and means over training seeds with Student's t.

A path is a run's panels as (evaluations, gain in reward, share of the pretrained Vendi Score), linear between panels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student_t

from hrf_fast.report.comparison import crossing

_LEVEL = 0.95


class Point(NamedTuple):
    """A panel's place on a run's path."""

    evaluations: float
    gain: float
    """Mean reward less the pretrained one."""
    kept: float
    """Vendi Score as a share of the pretrained one."""


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % interval; no interval from a single seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


class Paired(NamedTuple):
    """The mean difference over seeds with its 95 % interval, and the p of a paired t-test that it is 0."""

    difference: Estimate
    p: float | None


def path_of(line: Mapping[str, Any]) -> list[Point]:
    """A line's path, the pretrained model first: gain 0, share 1."""
    first = line["panels"][0]
    return [
        Point(p["evaluations"], p["reward"][0] - first["reward"][0], p["vendi"][0] / first["vendi"][0])
        for p in line["panels"]
    ]


def end_of(line: Mapping[str, Any]) -> int:
    """Index of the tuned model's panel: the last, or that of the checkpoint that the run restored, or of its blend."""
    if "alpha" in line:
        return [panel["alpha"] for panel in line["panels"]].index(line["alpha"])
    iterations = [panel.get("iteration") for panel in line["panels"]]
    return iterations.index(line["model"]) if "model" in line else len(iterations) - 1


def reported(line: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The pretrained model's panel and the tuned one's; of a blend those of the panel that did not choose it."""
    return line.get("second_panel") or [line["panels"][0], line["panels"][end_of(line)]]


def gain_at_diversity(path: Sequence[Point], floor: float) -> float:
    """The highest gain among the points of the path that keep at least `floor`, between panels too."""
    gains = [point.gain for point in path if point.kept >= floor]
    for one, two in zip(path, path[1:], strict=False):
        if (one.kept >= floor) != (two.kept >= floor):
            share = (one.kept - floor) / (one.kept - two.kept)
            gains.append(one.gain + share * (two.gain - one.gain))
    return max(gains)


def diversity_at_gain(path: Sequence[Point], gain: float) -> float | None:
    """The share kept where the gain first reaches `gain`; None where it does not, or for a gain of 0 or less."""
    # in gains, as the level was found: a sum with the pretrained reward may round to above the run's best panel
    crossed = crossing([point.gain for point in path], gain)
    if crossed is None:
        return None
    after, share = crossed
    return (1 - share) * path[after - 1].kept + share * path[after].kept


def evaluations_to_gain(path: Sequence[Point], gain: float, floor: float) -> float | None:
    """Evaluations at the first point of the path with at least `gain` and at least `floor` kept; None without one."""
    for one, two in zip(path, path[1:], strict=False):
        # shares of the way on which both hold
        spans = [_above(one.gain, two.gain, gain), _above(one.kept, two.kept, floor)]
        if None not in spans:
            start = max(span[0] for span in spans if span)
            # the very gain of `gain_at_diversity` crosses both levels at one place, but for rounding
            if start <= min(span[1] for span in spans if span) + 1e-9:
                return one.evaluations + start * (two.evaluations - one.evaluations)
    return None


def seconds_to_gain(line: Mapping[str, Any], gain: float, floor: float) -> float | None:
    """Seconds of training at that point; None without one, or for a line whose panels have no seconds.

    Between panels seconds pass as evaluations do. Panels and checkpoints count nothing.
    """
    panels, evaluations = line["panels"], evaluations_to_gain(path_of(line), gain, floor)
    if evaluations is None or any("seconds" not in panel for panel in panels):
        return None
    for one, two in zip(panels, panels[1:], strict=False):
        if one["evaluations"] <= evaluations <= two["evaluations"]:
            # panels of blends all have the evaluations of their run
            share = (evaluations - one["evaluations"]) / (two["evaluations"] - one["evaluations"] or 1)
            return float(one["seconds"] + share * (two["seconds"] - one["seconds"]))
    return None


def _above(one: float, two: float, level: float) -> tuple[float, float] | None:
    """The part of the way from `one` to `two`, as shares, on which a linear value is at least `level`."""
    if one >= level and two >= level:
        return 0.0, 1.0
    if one < level and two < level:
        return None
    crossing = (level - one) / (two - one)
    return (crossing, 1.0) if two >= level else (0.0, crossing)


def hypervolume(path: Sequence[Point]) -> float:
    """Area that the panels dominate in the plane of gain and share kept, from the reference point (0, 0).

    Zitzler and Thiele, IEEE Trans. Evol. Comput. 3(4), 1999.
    """
    area, best = 0.0, 0.0
    # from the highest gain down, a panel adds the strip that no panel of a higher gain has covered
    for point in sorted(path, key=lambda point: -point.gain):
        if point.gain > 0 and point.kept > best:
            area += point.gain * (point.kept - best)
            best = point.kept
    return area


def estimate(values: Sequence[float]) -> Estimate:
    """Mean over seeds with its 95 % interval by Student's t."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Estimate(mean, None, None, count)
    half = t_quantile((1 + _LEVEL) / 2, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Paired | None:
    """Compare two arms on the seeds that both have; None without one."""
    seeds = [seed for seed in values if seed in reference]
    if not seeds:
        return None
    differences = [values[seed] - reference[seed] for seed in seeds]
    difference = estimate(differences)
    if len(seeds) < 2:
        return Paired(difference, None)
    error = statistics.stdev(differences) / math.sqrt(len(seeds))
    if not error:
        return Paired(difference, 0.0 if difference.mean else 1.0)
    return Paired(difference, two_sided_p(difference.mean / error, len(seeds) - 1))


def ratio(values: Sequence[float], reference: Sequence[float]) -> Estimate | None:
    """The mean of one arm over the reference's, of the same seeds in one order (Fieller, J. R. Stat. Soc. B 16, 1954).

    The interval holds every R for which the paired differences value − R·reference may have mean 0. None without
    seeds, or where the reference's mean is not above 0; no interval from a single seed, or where the reference's own
    interval reaches 0.
    """
    if not values or statistics.fmean(reference) <= 0:
        return None
    top, bottom, count = statistics.fmean(values), statistics.fmean(reference), len(values)
    if count < 2:
        return Estimate(top / bottom, None, None, count)
    scale = t_quantile((1 + _LEVEL) / 2, count - 1) ** 2 / count
    # a·R² − 2·b·R + c ≤ 0
    a = bottom**2 - scale * statistics.variance(reference)
    b = top * bottom - scale * statistics.covariance(values, reference)
    c = top**2 - scale * statistics.variance(values)
    if a <= 0:
        return Estimate(top / bottom, None, None, count)
    root = math.sqrt(max(0.0, b * b - a * c))
    return Estimate(top / bottom, (b - root) / a, (b + root) / a, count)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Adjust the p of several tests by Holm's step-down rule (Scand. J. Statist. 6, 1979); None stays None."""
    known = sorted((p, index) for index, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted


def two_sided_p(value: float, degrees: int) -> float:
    """Probability that Student's t with `degrees` of freedom is farther from 0 than `value`."""
    return 2 * float(student_t.sf(abs(value), degrees))


def t_quantile(level: float, degrees: int) -> float:
    """The t that Student's t with `degrees` of freedom stays under with probability `level`."""
    return float(student_t.ppf(level, degrees))
