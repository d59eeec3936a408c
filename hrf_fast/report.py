"""Report: one self-contained HTML page that compares runs with the pretrained model they started from.

Every number is read from the run folders; nothing is sampled or scored again. Left out: averages over training seeds,
which need several runs of each method, so the page never says that one method is better than another.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hrf_fast.checkpoint import write_atomically
from hrf_fast.config import Config, differences, load_config
from hrf_fast.diversity import Interval, paired_difference_interval
from hrf_fast.plots import Series, diagnostics, frontier, interval_curves
from hrf_fast.run import read_log

METHODS = {"full": "DDPO", "clusters": "HRF", "dynamic": "HRF-D"}
# panels show the same images, scored the same way, only where all of these are equal
SAME_PANEL = (
    *("model.name", "model.revision", "reward.name", "reward.kwargs", "reward.terms"),
    *("sample.scheduler", "sample.num_inference_steps", "sample.eta"),
    *("evaluation.seed", "evaluation.panel_size", "evaluation.scorer"),
)
MID_RUN_GRIDS = 5
GRID_PIXELS, SMALL_GRID_PIXELS = 1024, 384  # larger grids are shrunk, so that the page opens at once
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc }
h3 { font-size: 1rem; margin-bottom: .3rem } table { border-collapse: collapse; margin: .8rem 0 }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
td { font-variant-numeric: tabular-nums } th { font-weight: 600 } li { overflow-wrap: anywhere }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start } figure { margin: 0; break-inside: avoid }
.half { flex: 1 1 26rem; max-width: 34rem } .wide { width: 100% } .grid { flex: 1 1 16rem; max-width: 32rem }
.small { flex: 0 1 12rem } img { width: 100%; height: auto } figcaption { font-size: .85rem; color: #444 }
pre { font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere } .scroll { overflow-x: auto }
@media print { body { margin: 0; max-width: none; font-size: 11px } h2, h3 { break-after: avoid } }
"""


@dataclass(frozen=True)
class RunLog:
    """A run folder as read: the records of evaluations.jsonl (the pretrained model first) and of metrics.jsonl."""

    folder: Path
    config: Config
    panels: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    finished: bool
    name: str

    def score(self, name: str, panel: int = -1) -> Interval | None:
        """A panel's `reward`, `vendi` or `inception`, of the last panel by default; None if nothing measured it."""
        return Interval(*self.panels[panel][name]) if name in self.panels[panel] else None

    def values(self, name: str) -> list[float]:
        """A score of every panel, without its interval."""
        return [panel[name][0] for panel in self.panels]


@dataclass(frozen=True)
class Table:
    """Text cells, for the page and for the terminal."""

    header: list[str]
    rows: list[list[str]]

    def html(self) -> str:
        lines = [_tags("th", self.header), *(_tags("td", row) for row in self.rows)]
        return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'

    def text(self) -> list[str]:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def write_report(runs: list[Path], out: Path | None = None) -> Path:
    """Compare runs that started from one model: scores, diversity at equal reward, curves, grids and times.

    Args:
        runs: run folders; the iteration-0 panel of the first is the pretrained model's.
        out: the HTML file; report.html in the first run by default.

    Returns:
        The file written. It needs no other file and no network.

    Raises:
        ValueError: a folder holds no run or nothing to report yet, or the runs' panels can't be compared.
    """
    logs = read_runs(runs)
    out = out or logs[0].folder / "report.html"
    if out.is_dir():
        raise ValueError(f"the report can't be written to {out}, which is a folder; name an HTML file")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, _page(logs).encode())
    return out


def summary_lines(runs: list[Path]) -> list[str]:
    """The report's tables of scores and what may be said of them, as plain text; raises as `write_report`."""
    logs = read_runs(runs)
    lines = [*map(describe, logs), "", *result_table(logs).text(), ""]
    if table := equal_reward_table(logs):
        lines += [f"At equal reward, {_number(equal_reward(logs))}:", *table.text(), ""]
    return lines + findings(logs)


def read_runs(folders: Sequence[Path]) -> list[RunLog]:
    """Read run folders and check that their panels may be compared.

    Raises:
        ValueError: as `write_report`.
    """
    if not folders:
        raise ValueError("no run folder was given; name at least one that `hrf train` wrote")
    if twice := [str(folder) for folder, count in Counter(f.resolve() for f in folders).items() if count > 1]:
        raise ValueError(f"{twice[0]} is given twice; name each run once")
    logs = [_read(folder) for folder in folders]
    first = logs[0]
    for other in logs[1:]:
        found = differences(first.config, other.config)
        if unequal := [f"{key} is {found[key][0]!r} and {found[key][1]!r}" for key in SAME_PANEL if key in found]:
            raise ValueError(
                f"{first.folder} and {other.folder} can't be compared, their panels are not alike: {'; '.join(unequal)}. "
                "Report them one by one, or train again with these options equal"
            )
        start, (_, low, high) = other.panels[0]["reward"][0], first.panels[0]["reward"]
        if not low <= start <= high:
            raise ValueError(
                f"{first.folder} and {other.folder} can't be compared, they did not start from the same weights: the "
                f"pretrained panel of the second scores {_number(start)}, outside [{_number(low)}, {_number(high)}] of the first"
            )
    for part in ("name", "path"):
        names = Counter(log.name for log in logs)
        logs = [
            replace(log, name=f"{METHODS.get(log.config.window.schedule, log.config.window.schedule)} ({where})")
            if names[log.name] > 1
            else log
            for log, where in ((log, log.folder.name if part == "name" else str(log.folder)) for log in logs)
        ]
    return logs


def _read(folder: Path) -> RunLog:
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.yaml; give one that `hrf train` wrote")
    config = load_config(["--config", str(folder / "config.yaml")])
    panels, metrics = _read_records(folder / "evaluations.jsonl"), _read_records(folder / "metrics.jsonl")
    if not panels or panels[0]["iteration"] != 0:
        raise ValueError(
            f"{folder} has no panel of the pretrained model in evaluations.jsonl; the panel is made when training starts: "
            "wait for it, or start the run with `hrf train`"
        )
    if not metrics:
        raise ValueError(
            f"{folder} has no finished iteration in metrics.jsonl; wait for the first, or resume the run with `hrf train`"
        )
    done, budget = metrics[-1]["iteration"] + 1, config.train.max_evaluations
    complete = done >= config.train.iterations or 0 < budget <= metrics[-1]["evaluations"]
    # a run that is being extended still has the model/ of its earlier end
    finished = (folder / "model").is_dir() and complete and panels[-1]["iteration"] == done
    name = METHODS.get(config.window.schedule, config.window.schedule)
    return RunLog(folder, config, panels, metrics, finished, name)


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        return read_log(path)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a line that is not JSON ({error}); mend or delete that line") from error


def describe(log: RunLog) -> str:
    """A run in one line."""
    config, last = log.config, log.metrics[-1]
    return " · ".join(
        [
            log.name + ("" if log.finished else " (unfinished)"),
            config.model.name,
            _reward_name(config),
            f"T {config.sample.num_inference_steps}",
            f"{last['iteration'] + 1} of {config.train.iterations} iterations",
            f"{last['images']:,} images trained",
            f"{last['evaluations']:,} UNet evaluations",
            f"seed {config.run.seed}",
            str(log.folder),
        ]
    )


def gain(log: RunLog, pretrained: RunLog) -> Interval:
    """Mean reward of the last panel less that of the pretrained panel, paired image by image."""
    before, after = (torch.tensor(p["rewards"], dtype=torch.float64) for p in (pretrained.panels[0], log.panels[-1]))
    evaluation = log.config.evaluation
    return paired_difference_interval(before, after, resamples=evaluation.resamples, seed=evaluation.seed)


def result_table(logs: Sequence[RunLog]) -> Table:
    """The pretrained model and every run's last panel."""
    first = logs[0]
    table = Table(["", "reward", "gain", "Vendi Score", "kept", "Inception Score", "UNet evaluations"], [])
    for name, log, panel in [("pretrained", first, 0), *((log.name, log, -1) for log in logs)]:
        table.rows.append(
            [
                name + (" (unfinished)" if panel and not log.finished else ""),
                _interval(log.score("reward", panel)),
                _interval(gain(log, first), "+.4g") if panel else "",
                _interval(log.score("vendi", panel)),
                _share(log.score("vendi", panel), first.score("vendi", 0)) if panel else "",
                _interval(log.score("inception", panel)),
                f"{log.panels[panel]['evaluations']:,}",
            ]
        )
    # a column that nothing fills is left out
    keep = [i for i in range(len(table.header)) if i == 0 or any(row[i] for row in table.rows)]
    return Table([table.header[i] for i in keep], [[row[i] for i in keep] for row in table.rows])


def equal_reward(logs: Sequence[RunLog]) -> float:
    """The smallest of the runs' last panel rewards: the highest level that all of them ended at or above."""
    return min(log.values("reward")[-1] for log in logs)


def at_reward(log: RunLog, level: float) -> tuple[float, Interval] | None:
    """UNet evaluations and Vendi Score where a run's panel reward first reaches `level`.

    Linear between panels, along the reward; the interval's ends are interpolated likewise. None where the pretrained
    panel is there already, or no panel is.
    """
    rewards = log.values("reward")
    after = next((i for i, reward in enumerate(rewards) if reward >= level), 0)
    if after == 0:
        return None
    weight = (level - rewards[after - 1]) / (rewards[after] - rewards[after - 1])

    def between(a: float, b: float) -> float:
        return a + weight * (b - a)

    low, high = log.panels[after - 1], log.panels[after]
    return between(low["evaluations"], high["evaluations"]), Interval(*map(between, low["vendi"], high["vendi"]))


def equal_reward_table(logs: Sequence[RunLog]) -> Table | None:
    """Who keeps more diversity at the same reward; None for one run, without Vendi Scores, or where no reward rose."""
    start, level = logs[0].score("vendi", 0), equal_reward(logs)
    if len(logs) < 2 or start is None:
        return None
    points = [at_reward(log, level) for log in logs]
    rows = [
        [log.name, _interval(vendi), _share(vendi, start), f"{evaluations:,.0f}"]
        for log, (evaluations, vendi) in zip(logs, [p for p in points if p], strict=len(points) == len(logs))
    ] if all(points) else []
    return Table(["", "Vendi Score", "kept", "UNet evaluations"], rows) if rows else None
