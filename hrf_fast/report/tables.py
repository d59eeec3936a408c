"""Tables and sentences of a report, as text: what `hrf report` prints and its page shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hrf_fast.evaluation.diversity import Interval
from hrf_fast.report.comparison import RunLog, at_reward, gain, lowest_end, shared_held_out
from hrf_fast.run.card import reward_name
from hrf_fast.run.files import HELD_OUT


@dataclass(frozen=True)
class Table:
    """Cells of text, the first row its header; a column that nothing fills is dropped."""

    rows: list[list[str]]

    def __post_init__(self) -> None:
        filled = [i for i in range(len(self.rows[0])) if i == 0 or any(row[i] for row in self.rows[1:])]
        object.__setattr__(self, "rows", [[row[i] for i in filled] for row in self.rows])

    def lines(self) -> list[str]:
        """Aligned plain text."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in self.rows]


def result_table(logs: Sequence[RunLog]) -> Table:
    """Tabulate the pretrained model and each run's tuned one."""
    first, before = logs[0], logs[0].metric("vendi", 0)
    shared = shared_held_out(logs)
    held_out = [f"held-out {name.removeprefix(HELD_OUT)}" for name in shared]
    scores = ["Vendi Score", "kept", "per prompt", "looks", "Inception Score"]
    rows = [["", "reward", "gain", *held_out, *scores, "UNet evaluations"]]
    for title, log, panel in [("pretrained", first, 0), *((run_title(log), log, log.model) for log in logs)]:
        # the run's row, also where the pretrained weights came back
        change = [interval_text(gain(log, first), "+"), _share(log.metric("vendi"), before)] if rows[1:] else ["", ""]
        names = ("reward", "vendi", "vendi_per_prompt", "looks", "inception")
        metrics = [interval_text(log.metric(name, panel)) for name in names]
        others = [interval_text(log.metric(name, panel)) for name in shared]
        evaluations = f"{log.panels[panel]['evaluations']:,}"
        rows.append([title, metrics[0], change[0], *others, metrics[1], change[1], *metrics[2:], evaluations])
    return Table(rows)


def equal_reward_table(logs: Sequence[RunLog]) -> Table | None:
    """Tabulate the diversity kept at equal reward; None for one run, without Vendi Scores, or if a run did not rise."""
    before = logs[0].metric("vendi", 0)
    if len(logs) < 2 or before is None:
        return None
    rows = [["", "Vendi Score", "kept", "UNet evaluations"]]
    for log in logs:
        point = at_reward(log, lowest_end(logs))
        if point is None:
            return None
        rows.append([log.name, interval_text(point[1]), _share(point[1], before), f"{point[0]:,.0f}"])
    return Table(rows)


def findings(logs: Sequence[RunLog]) -> list[str]:
    """Say what the tables do and don't show, a sentence each."""
    lines, weakest = [], min(logs, key=lambda log: log.end)
    for log in logs:
        change = gain(log, logs[0])
        if len(log.panels) == 1:
            lines.append(f"{log.name}: no panel after the pretrained one yet.")
        elif change.low <= 0 <= change.high:
            lines.append(f"{log.name}: no gain beyond its interval.")
        elif change.high < 0:
            lines.append(f"{log.name}: the reward fell.")
        for name in log.held_out:
            start, end = log.metric(name, 0), log.metric(name)
            if start and end and end.high < start.low:
                lines.append(
                    f"{log.name}: the held-out reward {name.removeprefix(HELD_OUT)} fell beyond its intervals."
                )
    if logs[0].metric("vendi", 0) is None:
        lines.append("No Vendi Score: evaluation.network has none for this model, so diversity was not measured.")
    elif len(logs) > 1 and equal_reward_table(logs) is None:
        lines.append(f"No comparison at equal reward: {weakest.name} did not end above the pretrained model.")
    elif len(logs) > 1:
        low, points = gain(weakest, logs[0]).low, [at_reward(log, lowest_end(logs)) for log in logs]
        vendi = [point[1] for point in points if point]
        if low <= 0:
            lines.append(f"The level of equal reward is {weakest.name}'s, no gain beyond its interval: it says little.")
        if max(v.low for v in vendi) <= min(v.high for v in vendi):
            lines.append("At equal reward the intervals of the Vendi Scores overlap.")
    first = logs[0].panels[0]["rewards"]
    if any(log.panels[0]["rewards"] != first for log in logs):
        lines.append(
            "The runs' pretrained panels are close but not identical (two machines?); the first run's is used."
        )
    return [
        *lines,
        f"Brackets are 95 % bootstrap intervals over the panel's {len(first)} images, from the same noise in every "
        "panel; gains are paired image by image. They say nothing about other training seeds.",
    ]


def happenings(logs: Sequence[RunLog]) -> list[str]:
    """Say what the rules of `stop` have seen in each run, in the order in which it happened."""
    return [f"{log.name}, after {e['iteration']} iterations: {_sentence(e)}" for log in logs for e in log.events]


def _sentence(event: dict[str, Any]) -> str:
    if event["event"] != "end":
        return event["text"]
    model = event["figures"]["model"]
    restored = f"; the tuned model is that after {model:g}" if model != event["iteration"] else ""
    return f"the end: {event['text']}{restored}"


def run_title(log: RunLog) -> str:
    """The run's name, marked if the run has not finished."""
    return log.name if log.finished else f"{log.name} (unfinished)"


def run_line(log: RunLog) -> str:
    """Describe a run in one line."""
    config, last = log.config, log.metrics[-1]
    # where a budget of evaluations ends the run, its iterations are only a ceiling
    planned = "" if config.stop.max_evaluations else f" of {config.train.iterations}"
    parts = [
        run_title(log),
        config.model.name,
        reward_name(config.reward),
        f"T {config.sample.num_inference_steps}",
        f"{last['iteration'] + 1}{planned} iterations",
        f"{last['images']:,} images trained",
        f"{last['evaluations']:,} UNet evaluations",
        f"seed {config.run.seed}",
        str(log.folder),
    ]
    return " · ".join(parts)


def interval_text(interval: Sequence[float] | None, sign: str = "") -> str:
    """A value with its interval, where there is one, in four digits; empty for None.

    Args:
        interval: [value] or [value, low, high]; sign: "+" for a difference.
    """
    return "" if interval is None else _bracketed([format(number, f"{sign}#.4g") for number in interval])


def percent_text(interval: Sequence[float], sign: str = "") -> str:
    """Shares in per cent; arguments as `interval_text`."""
    return _bracketed([f"{100 * share:{sign}.1f} %" for share in interval])


def _bracketed(texts: Sequence[str]) -> str:
    value, *ends = texts
    return f"{value} [{', '.join(ends)}]" if ends else value


def _share(vendi: Interval | None, before: Interval | None) -> str:
    return percent_text([vendi.value / before.value]) if vendi and before else ""
