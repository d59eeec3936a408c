"""Comparison: the numbers of a report, read from run folders that started from one pretrained model.

Nothing is sampled or scored again, and no torch model is loaded. Left out: averages over training seeds, which need
several runs of each method, so nothing here says that one method is better than another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hrf_fast.config.load import differences, load_config
from hrf_fast.config.options import FACTS, Config
from hrf_fast.evaluation.diversity import Interval, paired_difference_interval
from hrf_fast.run.files import read_log

METHODS = {"full": "DDPO", "clusters": "HRF", "dynamic": "HRF-D"}


@dataclass(frozen=True)
class RunLog:
    """A run folder as read: the records of evaluations.jsonl (the pretrained model first) and of metrics.jsonl."""

    name: str
    folder: Path
    config: Config
    panels: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    finished: bool

    def score(self, name: str, panel: int = -1) -> Interval | None:
        """A panel's `reward`, `vendi` or `inception`, of the last panel by default; None if nothing measured it."""
        return Interval(*self.panels[panel][name]) if name in self.panels[panel] else None

    def rewards(self) -> list[float]:
        """The mean reward of every panel."""
        return [panel["reward"][0] for panel in self.panels]


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


def read_runs(folders: Sequence[Path]) -> list[RunLog]:
    """Read run folders and check that their panels may be compared.

    Returns:
        In the order given, named by method, and by folder where a method comes twice.

    Raises:
        ValueError: a folder holds no run or nothing to report yet, or the runs' panels can't be compared.
    """
    if not folders:
        raise ValueError("no run folder was given; name at least one that `hrf train` wrote")
    resolved = Counter(folder.resolve() for folder in folders)
    for folder in folders:
        if resolved[folder.resolve()] > 1:
            raise ValueError(f"{folder} is given twice; name each run once")
    logs = [_read(folder) for folder in folders]
    for log in logs[1:]:
        _check_comparable(logs[0], log)
    methods, ends = (Counter(names) for names in ([log.name for log in logs], [p.name for p in resolved]))
    where = [str(log.folder) if ends[end.name] > 1 else end.name for log, end in zip(logs, resolved, strict=True)]
    return [
        replace(log, name=f"{log.name} ({place})") if methods[log.name] > 1 else log
        for log, place in zip(logs, where, strict=True)
    ]


def _read(folder: Path) -> RunLog:
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.yaml; give one that `hrf train` wrote")
    config = load_config(["--config", str(folder / "config.yaml")])
    panels, metrics = read_log(folder / "evaluations.jsonl"), read_log(folder / "metrics.jsonl")
    if not panels or panels[0]["iteration"] != 0:
        raise ValueError(
            f"{folder} has no panel of the pretrained model in evaluations.jsonl, the first thing that training makes; "
            "wait for it, or start the run with `hrf train`"
        )
    if not metrics:
        raise ValueError(
            f"{folder} has no finished iteration in metrics.jsonl; wait for the first, "
            "or resume the run with the same `hrf train` command"
        )
    done, budget = metrics[-1]["iteration"] + 1, config.stop.max_evaluations
    complete = done >= config.train.iterations or 0 < budget <= metrics[-1]["evaluations"]
    # a run that is being extended still has the model/ of its earlier end
    finished = (folder / "model").is_dir() and complete and panels[-1]["iteration"] == done
    method = METHODS.get(config.window.schedule, config.window.schedule)
    return RunLog(method, folder, config, panels, metrics, finished)


def _check_comparable(first: RunLog, other: RunLog) -> None:
    both = f"{first.folder} and {other.folder} can't be compared"
    unequal = {key: pair for key, pair in differences(first.config, other.config).items() if FACTS[key].panel}
    if unequal:
        listed = "; ".join(f"{key} is {one!r} and {two!r}" for key, (one, two) in unequal.items())
        raise ValueError(
            f"{both}, their panels are of different images or scores: {listed}. Report each run alone, or train again "
            "with these options equal"
        )
    start, (_, low, high) = other.panels[0]["reward"][0], first.panels[0]["reward"]
    if not low <= start <= high:
        raise ValueError(
            f"{both}, they did not start from the same weights: the second's pretrained panel scores {start:.4g}, "
            f"outside the first's [{low:.4g}, {high:.4g}]. Report each run alone, or train again from one model"
        )


def gain(log: RunLog, pretrained: RunLog) -> Interval:
    """Mean reward of the last panel less that of the pretrained one, paired image by image."""
    before, after = (torch.tensor(p["rewards"], dtype=torch.float64) for p in (pretrained.panels[0], log.panels[-1]))
    return paired_difference_interval(before, after, seed=log.config.evaluation.seed)


def lowest_end(logs: Sequence[RunLog]) -> float:
    """The smallest of the runs' last panel rewards: the highest level that all of them have reached."""
    return min(log.rewards()[-1] for log in logs)


def at_reward(log: RunLog, level: float) -> tuple[float, Interval] | None:
    """UNet evaluations and Vendi Score where the run's panel reward first reaches `level`.

    Linear between the two panels, along the reward; the ends of the interval likewise. None where the pretrained panel
    is there already or no panel is.
    """
    rewards = log.rewards()
    after = next((i for i, reward in enumerate(rewards) if reward >= level), 0)
    if after == 0:
        return None
    share = (level - rewards[after - 1]) / (rewards[after] - rewards[after - 1])
    one, two = log.panels[after - 1], log.panels[after]
    vendi = [(1 - share) * a + share * b for a, b in zip(one["vendi"], two["vendi"], strict=True)]
    return (1 - share) * one["evaluations"] + share * two["evaluations"], Interval(*vendi)


def result_table(logs: Sequence[RunLog]) -> Table:
    """The pretrained model and each run's last panel."""
    rows = [["", "reward", "gain", "Vendi Score", "kept", "Inception Score", "UNet evaluations"]]
    first, before = logs[0], logs[0].score("vendi", 0)
    for name, log, panel in [("pretrained", first, 0), *((run_title(log), log, -1) for log in logs)]:
        change = [_interval(gain(log, first), "+"), _share(log.score("vendi"), before)] if panel else ["", ""]
        scores = [_interval(log.score(score, panel)) for score in ("reward", "vendi", "inception")]
        evaluations = f"{log.panels[panel]['evaluations']:,}"
        rows.append([name, scores[0], change[0], scores[1], change[1], scores[2], evaluations])
    return Table(rows)


def equal_reward_table(logs: Sequence[RunLog]) -> Table | None:
    """Who keeps more diversity at the same reward; None for one run, without Vendi Scores, or if a run did not rise."""
    before = logs[0].score("vendi", 0)
    if len(logs) < 2 or before is None:
        return None
    rows = [["", "Vendi Score", "kept", "UNet evaluations"]]
    for log in logs:
        point = at_reward(log, lowest_end(logs))
        if point is None:
            return None
        rows.append([log.name, _interval(point[1]), _share(point[1], before), f"{point[0]:,.0f}"])
    return Table(rows)


def findings(logs: Sequence[RunLog]) -> list[str]:
    """What the tables do and don't show, a sentence each."""
    said, weakest = [], min(logs, key=lambda log: log.rewards()[-1])
    for log in logs:
        change = gain(log, logs[0])
        if len(log.panels) == 1:
            said.append(f"{log.name}: no panel after the pretrained one yet.")
        elif change.low <= 0 <= change.high:
            said.append(f"{log.name}: no gain beyond its interval.")
        elif change.high < 0:
            said.append(f"{log.name}: the reward fell.")
    if logs[0].score("vendi", 0) is None:
        said.append("No Vendi Score: evaluation.network has no network for this model, so diversity was not measured.")
    elif len(logs) > 1 and equal_reward_table(logs) is None:
        said.append(f"No comparison at equal reward: {weakest.name} did not end above the pretrained model.")
    elif len(logs) > 1:
        low, points = gain(weakest, logs[0]).low, [at_reward(log, lowest_end(logs)) for log in logs]
        vendi = [point[1] for point in points if point]
        if low <= 0:
            said.append(f"The level of equal reward is {weakest.name}'s, no gain beyond its interval: it says little.")
        if max(v.low for v in vendi) <= min(v.high for v in vendi):
            said.append("At equal reward the intervals of the Vendi Scores overlap.")
    first = logs[0].panels[0]["rewards"]
    if any(log.panels[0]["rewards"] != first for log in logs):
        said.append("The runs' pretrained panels are close but not identical (two machines?); the first run's is used.")
    return [
        *said,
        f"Brackets are 95 % bootstrap intervals over the panel's {len(first)} images, from the same noise in every "
        "panel; gains are paired image by image. They say nothing about other training seeds.",
    ]


def run_title(log: RunLog) -> str:
    """The run's name, marked if it has not finished."""
    return log.name if log.finished else f"{log.name} (unfinished)"


def describe(log: RunLog) -> str:
    """A run in one line."""
    config, last = log.config, log.metrics[-1]
    # where a budget of evaluations ends the run, its iterations are only a ceiling
    planned = "" if config.stop.max_evaluations else f" of {config.train.iterations}"
    parts = [
        run_title(log),
        config.model.name,
        reward_name(config),
        f"T {config.sample.num_inference_steps}",
        f"{last['iteration'] + 1}{planned} iterations",
        f"{last['images']:,} images trained",
        f"{last['evaluations']:,} UNet evaluations",
        f"seed {config.run.seed}",
        str(log.folder),
    ]
    return " · ".join(parts)


def reward_name(config: Config) -> str:
    """The reward's name, or its weighted sum."""
    return config.reward.name or " + ".join(f"{term.weight:g} {term.name}" for term in config.reward.terms)


def _interval(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return ""
    value, low, high = (format(number, f"{sign}#.4g") for number in interval)
    return f"{value} [{low}, {high}]"


def _share(vendi: Interval | None, before: Interval | None) -> str:
    return f"{100 * vendi.value / before.value:.1f} %" if vendi and before else ""
