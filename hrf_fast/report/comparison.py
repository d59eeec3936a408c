"""Comparison: the numbers of a report, read from run folders that started from one pretrained model.

No image is sampled or rewarded again, and no torch model is loaded. Left out: averages over training seeds, which need
several runs of each method, so nothing here says that one method is better than another. `tables.py` sets the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hrf_fast.config.credentials import without_credentials
from hrf_fast.config.load import differences
from hrf_fast.config.options import FACTS, Config
from hrf_fast.evaluation.diversity import Interval, paired_difference_interval
from hrf_fast.run.card import METHODS
from hrf_fast.run.files import HELD_OUT, intervals_of
from hrf_fast.run.finished import existing_run
from hrf_fast.run.layout import EVALUATIONS
from hrf_fast.run.sources import edited, read_sources

# names of metrics.jsonl that a report reads
METRICS = {
    "images": "count",
    "evaluations": "count",
    "seconds": "mapping of numbers",
    **dict.fromkeys(("reward_mean", "reward_std"), "number"),
    # an iteration may make no optimizer step
    **dict.fromkeys(("approx_kl", "clip_fraction", "grad_norm"), "number or null"),
    **dict.fromkeys(("window_starts", "window_stops"), "list of numbers?"),
    **dict.fromkeys(("gradient_signal", "gradient_noise"), "number?"),
}


@dataclass(frozen=True)
class RunLog:
    """A run folder as read: evaluations.jsonl (the pretrained model first), metrics.jsonl and events.jsonl."""

    name: str
    folder: Path
    config: Config
    panels: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    finished: bool
    events: list[dict[str, Any]] = field(default_factory=list)
    model: int = -1
    """Index of the panel of the tuned model: the last one's, or that of the checkpoint that was restored."""

    def metric(self, name: str, panel: int | None = None) -> Interval | None:
        """A panel's interval of this name, of the tuned model by default; None if nothing measured it."""
        measured = intervals_of(self.panels[self.model if panel is None else panel])
        return Interval(*measured[name]) if name in measured else None

    def rewards(self) -> list[float]:
        """The mean reward of every panel."""
        return [panel["reward"][0] for panel in self.panels]

    @property
    def held_out(self) -> list[str]:
        """Held-out rewards, as `metric` names them."""
        return [name for name in intervals_of(self.panels[0]) if name.startswith(HELD_OUT) and self._has(name)]

    def _has(self, name: str) -> bool:
        """Whether all panels have a figure, which a resume may have left out or added."""
        return all(name in intervals_of(panel) for panel in self.panels)

    @property
    def end(self) -> float:
        """The mean reward of the tuned model's panel."""
        return self.rewards()[self.model]


def read_runs(folders: Sequence[Path], names: Sequence[str] = ()) -> list[RunLog]:
    """Read run folders and check that their panels may be compared.

    Args:
        names: of the runs in their order, as `--name` gives them.

    Returns:
        In the order given; without names, named by method, and by folder where a method comes twice.

    Raises:
        ValueError: a folder holds no run or nothing to report yet, the runs' panels can't be compared, or the names are
            not one for each run, all different.
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
    if names:
        return [replace(log, name=name) for log, name in zip(logs, _checked(names, folders), strict=True)]
    methods, ends = (Counter(names) for names in ([log.name for log in logs], [p.name for p in resolved]))
    labels = [str(log.folder) if ends[end.name] > 1 else end.name for log, end in zip(logs, resolved, strict=True)]
    return [
        replace(log, name=f"{log.name} ({label})") if methods[log.name] > 1 else log
        for log, label in zip(logs, labels, strict=True)
    ]


def _checked(names: Sequence[str], folders: Sequence[Path]) -> Sequence[str]:
    if len(names) != len(folders):
        raise ValueError(
            f"the number of --name is {len(names)} and that of runs {len(folders)}; give a name for each run, in the "
            "order of the runs, or none"
        )
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"--name {name!r} is given {count} times; give every run a name of its own")
    return names


def shared_held_out(logs: Sequence[RunLog]) -> list[str]:
    """The held-out rewards that all panels of all runs have."""
    return [name for name in logs[0].held_out if all(name in log.held_out for log in logs)]


def _read(folder: Path) -> RunLog:
    files = existing_run(folder)
    config = files.read_config()
    panels, metrics = files.panels(), files.metrics(METRICS)
    if not panels or panels[0]["iteration"] != 0:
        raise ValueError(
            f"{folder} has no panel of the pretrained model in evaluations.jsonl, the first thing that training makes; "
            "wait for it, or start the run with `hrf train`"
        )
    first = panels[0]
    measured = {name for name in intervals_of(first) if not name.startswith(HELD_OUT)}
    if (
        any(len(p["rewards"]) != len(first["rewards"]) or measured - intervals_of(p).keys() for p in panels)
        or first.get("vendi", [1.0])[0] <= 0
    ):
        raise ValueError(
            f"{folder / EVALUATIONS} has panels of other images than the first one or without its metrics, "
            "or no diversity to begin with; mend or delete those lines"
        )
    events, ends = files.events(), files.ends()
    if not metrics and any(end["iteration"] == 0 for end in ends):
        raise ValueError(
            f"{folder} ended before its first iteration, as its events.jsonl says: there is nothing to report"
        )
    if not metrics:
        raise ValueError(
            f"{folder} has no finished iteration in metrics.jsonl; wait for the first, "
            "or resume the run with the same `hrf train` command"
        )
    done, budget = metrics[-1]["iteration"] + 1, config.stop.max_evaluations
    complete = done >= config.train.iterations or 0 < budget <= metrics[-1]["evaluations"]
    ends = [end for end in ends if end["iteration"] == done]
    # a run that is being extended still has the model/ of its earlier end
    complete = bool(ends) or (complete and panels[-1]["iteration"] == done)
    finished = files.model.is_dir() and complete
    tuned = ends[-1]["figures"]["model"] if ends else panels[-1]["iteration"]
    model = next((i for i, panel in enumerate(panels) if panel["iteration"] == tuned), -1)
    method = METHODS.get(config.window.schedule, config.window.schedule)
    return RunLog(method, folder, config, panels, metrics, finished, events, model)


def _check_comparable(first: RunLog, other: RunLog) -> None:
    both = f"{first.folder} and {other.folder} can't be compared"
    unequal = {key: pair for key, pair in differences(first.config, other.config).items() if FACTS[key].panel}
    if unequal:
        shown = {key: without_credentials(list(pair)) for key, pair in unequal.items()}
        listed = "; ".join(f"{key} is {one!r} and {two!r}" for key, (one, two) in shown.items())
        raise ValueError(
            f"{both}, their panels are of different images or metrics: {listed}. Report each run alone, or train again "
            "with these options equal"
        )
    kinds = ("reward ", "held-out reward ")
    rewards = {name: source for name, source in read_sources(first.folder).items() if name.startswith(kinds)}
    if changed := edited(other.folder, rewards):
        ((name, file), *_) = changed.items()
        raise ValueError(
            f"{both}, {name} had other code in each ({file}). Report each run alone, or train again with one file"
        )
    prompts = [log.panels[0].get("prompts") for log in (first, other)]
    if prompts[0] != prompts[1]:
        raise ValueError(
            f"{both}, their panels are of different prompts: {prompts[0]} and {prompts[1]}. Report each run alone, or "
            "train again with one evaluation.prompts"
        )
    start, (_, low, high) = other.panels[0]["reward"][0], first.panels[0]["reward"]
    if not low <= start <= high:
        raise ValueError(
            f"{both}, they did not start from the same weights: the second's pretrained reward is {start:.4g}, outside "
            f"the first's [{low:.4g}, {high:.4g}]. Report each run alone, or train again from one model"
        )


def gain(log: RunLog, pretrained: RunLog) -> Interval:
    """Mean reward of the tuned model's panel less that of the pretrained one, paired image by image."""
    before, after = (
        torch.tensor(p["rewards"], dtype=torch.float64) for p in (pretrained.panels[0], log.panels[log.model])
    )
    return paired_difference_interval(before, after, seed=log.config.evaluation.seed)


def lowest_end(logs: Sequence[RunLog]) -> float:
    """The smallest of the tuned models' panel rewards: the highest level that all of the runs have reached."""
    return min(log.end for log in logs)


def crossing(values: Sequence[float], level: float) -> tuple[int, float] | None:
    """Where values first reach a level: the index of the first that is there, and the share of the way to it.

    None where the first value is there already or none is.
    """
    after = next((i for i, value in enumerate(values) if value >= level), 0)
    return (after, (level - values[after - 1]) / (values[after] - values[after - 1])) if after else None


def at_reward(log: RunLog, level: float) -> tuple[float, Interval] | None:
    """UNet evaluations and Vendi Score where the run's panel reward first reaches `level`.

    Linear between the two panels, along the reward; the ends of the interval likewise. None where the pretrained panel
    is there already or no panel is.
    """
    crossed = crossing(log.rewards(), level)
    if crossed is None:
        return None
    after, share = crossed
    one, two = log.panels[after - 1], log.panels[after]
    vendi = [(1 - share) * a + share * b for a, b in zip(one["vendi"], two["vendi"], strict=True)]
    return (1 - share) * one["evaluations"] + share * two["evaluations"], Interval(*vendi)
