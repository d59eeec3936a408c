"""The toys' lines as a table with intervals and a picture of every arm's way."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.tables import markdown_table, with_interval
from benchmarks.toys.mixtures import effective_modes, modes_kept
from hrf_fast.report.plots import COLOURS, DPI, FONT, LINES, MARKERS
from hrf_fast.study.statistics import Estimate, Point, estimate, gain_at_diversity, holm, paired

Line = dict[str, Any]
KEEP = 0.9
"""Floor of the effective number of good modes, as a share of the pretrained model's."""
REFERENCE = "DDPO"
HEAD = (
    *("arm", "learning rate", "reward at the end", "good modes kept of 5", "effective number", "runs that lost a mode"),
    *(f"gain with {100 * KEEP:.0f} % kept", "less DDPO's", "p (Holm)"),
)


def path_of(line: Line) -> list[Point]:
    """A run's way: gain in reward, and the effective number of good modes as a share of the pretrained model's."""
    first = line["panels"][0]
    return [
        Point(p["evaluations"], p["reward"] - first["reward"], _effective(line, p) / _effective(line, first))
        for p in line["panels"]
    ]


def chosen_rates(lines: Sequence[Line]) -> dict[str, float]:
    """The learning rate of each arm by its tuning runs; the smaller one at a tie."""
    gains: dict[str, dict[float, list[float]]] = {}
    for line in lines:
        if line["tuning"]:
            by_rate = gains.setdefault(line["arm"], {})
            by_rate.setdefault(line["learning_rate"], []).append(gain_at_diversity(path_of(line), KEEP))
    return {
        arm: max(sorted(by_rate), key=lambda rate: statistics.fmean(by_rate[rate])) for arm, by_rate in gains.items()
    }


def table(lines: Sequence[Line], toy: str) -> str:
    """The Markdown table of one toy."""
    by_arm = _by_arm(lines, toy)
    gains = {
        arm: {s: gain_at_diversity(path_of(line), KEEP) for s, line in runs.items()} for arm, runs in by_arm.items()
    }
    tests = {arm: paired(gains[arm], gains[REFERENCE]) for arm in by_arm if REFERENCE in gains and arm != REFERENCE}
    adjusted = dict(zip(tests, holm([test.p if test else None for test in tests.values()]), strict=True))
    rows = []
    for arm, runs in by_arm.items():
        test, ends = tests.get(arm), list(runs.values())
        losers = sum(_modes(line) < len(line["good"]) for line in ends)
        rows.append(
            [
                arm,
                f"{ends[0]['learning_rate']:g}",
                _shown(_over(ends, lambda line: line["panels"][-1]["reward"])),
                _shown(_over(ends, _modes)),
                _shown(_over(ends, lambda line: _effective(line, line["panels"][-1]))),
                f"{losers} of {len(ends)}",
                _shown(estimate(list(gains[arm].values())), "+"),
                _shown(test.difference, "+") if test else "",
                f"{p:.2g}" if (p := adjusted.get(arm)) is not None else "",
            ]
        )
    return markdown_table(HEAD, rows)


def picture(lines: Sequence[Line], toys: Sequence[str]) -> bytes:
    """PNG: per toy, every arm's mean way through the plane of reward and good modes, with intervals at its end."""
    figure = Figure(figsize=(6.4 * len(toys), 5.2), layout="constrained")
    for number, toy in enumerate(toys, start=1):
        axes = figure.add_subplot(1, len(toys), number)
        for index, (arm, runs) in enumerate(_by_arm(lines, toy).items()):
            ends = list(runs.values())
            count = min(len(line["panels"]) for line in ends)
            x = [statistics.fmean(line["panels"][i]["reward"] for line in ends) for i in range(count)]
            y = [statistics.fmean(_effective(line, line["panels"][i]) for line in ends) for i in range(count)]
            look: dict[str, Any] = {
                "color": COLOURS[index % len(COLOURS)],
                "linestyle": LINES[index // len(COLOURS) % len(LINES)],
            }
            axes.plot(x, y, **look, linewidth=1.3, marker=MARKERS[index % len(MARKERS)], markersize=3.5, label=arm)
            reward = _over(ends, lambda line: line["panels"][-1]["reward"])
            modes = _over(ends, lambda line: _effective(line, line["panels"][-1]))
            axes.errorbar([x[-1]], [y[-1]], yerr=_half(modes), xerr=_half(reward), **look, linewidth=0.8, alpha=0.7)
        axes.set_title(f"{toy}: {len(ends)} seeds, from the pretrained model (left) to the budget", fontsize=FONT)
        axes.set_xlabel("mean reward of 512 samples", fontsize=FONT)
        axes.set_ylabel("effective number of good modes", fontsize=FONT)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=FONT - 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=FONT - 2, frameon=False, loc="lower left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def write_report(lines: Sequence[Line], out: Path) -> str:
    """Write toy_modes.md and toy_modes.png into `out`, of runs at their arm's chosen rate; returns the page.

    Raises:
        ValueError: there are no lines to report.
    """
    toys = [toy for toy in dict.fromkeys(line["toy"] for line in lines) if _by_arm(lines, toy)]
    if not toys:
        raise ValueError(f"{out / 'toy_modes.jsonl'} has no finished runs; run without --report first")
    page = "\n".join(f"## {toy}\n\n{table(lines, toy)}\n" for toy in toys)
    (out / "toy_modes.md").write_text(page)
    (out / "toy_modes.png").write_bytes(picture(lines, toys))
    return page


def _by_arm(lines: Sequence[Line], toy: str) -> dict[str, dict[int, Line]]:
    """The compared runs of a toy by arm and seed, at the arm's chosen rate."""
    rates = chosen_rates(lines)
    runs: dict[str, dict[int, Line]] = {arm: {} for arm in rates}
    for line in lines:
        if line["toy"] == toy and not line["tuning"] and line["learning_rate"] == rates.get(line["arm"]):
            runs[line["arm"]][line["seed"]] = line
    return {arm: by_seed for arm, by_seed in runs.items() if by_seed}


def _effective(line: Line, panel: Mapping[str, Any]) -> float:
    return effective_modes(torch.tensor(panel["shares"])[line["good"]])


def _modes(line: Line) -> int:
    first, last = (torch.tensor(line["panels"][i]["shares"])[line["good"]] for i in (0, -1))
    return modes_kept(first, last)


def _over(lines: Sequence[Line], value: Callable[[Line], float]) -> Estimate:
    return estimate([value(line) for line in lines])


def _half(value: Estimate) -> float:
    return 0.0 if value.high is None else value.high - value.mean


def _shown(value: Estimate, sign: str = "") -> str:
    return with_interval(value, f"{sign}.2f")
