"""Report: one HTML page about one run or several that started from the same pretrained model.

The page needs no other file, no script and no network, and prints. Here its values are prepared, from comparison.py's
numbers, tables.py's tables and plots.py's figures; page.html.j2 lays them out.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from hrf_fast.config.load import differences, to_yaml
from hrf_fast.report.comparison import RunLog, lowest_end, read_runs
from hrf_fast.report.plots import Series, diagnostics, frontier, interval_curves
from hrf_fast.report.tables import (
    Table,
    describe,
    equal_reward_table,
    findings,
    happenings,
    result_table,
    run_title,
)
from hrf_fast.run.card import reward_name
from hrf_fast.run.files import write_atomically

TEMPLATE = "page.html.j2"
MID_RUN_GRIDS = 5
GRID_PIXELS, SMALL_GRID_PIXELS = 1024, 384  # larger grids are shrunk, so that the page opens at once
COST = "UNet evaluations"
DIAGNOSTICS = {
    "reward_mean": "reward, mean ± std of the training samples",
    "approx_kl": "approx_kl, old to new policy",
    "clip_fraction": "clip_fraction",
    "grad_norm": "grad_norm, before clipping",
}


class Figure(NamedTuple):
    """A PNG on the page: `kind` is the class that sizes it (plot, wide, grid, small)."""

    png: bytes
    caption: str
    kind: str

    @property
    def source(self) -> str:
        """The picture as a data URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def write_report(runs: list[Path], out: Path | None = None) -> Path:
    """Write the page about `runs`.

    Args:
        runs: run folders; the iteration-0 panel of the first is the pretrained model's.
        out: the HTML file; report.html in the first run by default.

    Returns:
        The file written.

    Raises:
        ValueError: a folder holds no run, nothing to report yet or lacks a grid, or the panels can't be compared.
    """
    logs = read_runs(runs)
    out = out or logs[0].folder / "report.html"
    if out.is_dir():
        raise ValueError(f"the report can't be written to {out}, which is a folder; name an HTML file")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, _page(logs).encode())
    return out


def summary_lines(runs: list[Path]) -> list[str]:
    """The page's runs, tables of metrics, findings and events as plain text.

    Raises:
        ValueError: as `write_report`, except for grids.
    """
    logs = read_runs(runs)
    lines = [*map(describe, logs), "", *result_table(logs).lines(), ""]
    if equal := equal_reward_table(logs):
        lines += [f"at equal reward, {lowest_end(logs):.4g}:", *equal.lines(), ""]
    return lines + findings(logs) + happenings(logs)


def _page(logs: Sequence[RunLog]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(_values(logs)) + "\n"


def _values(logs: Sequence[RunLog]) -> dict[str, Any]:
    """The template's values, under its names."""
    config, equal = logs[0].config, equal_reward_table(logs)
    return {
        "title": f"{' vs '.join(log.name for log in logs)}: {config.model.name}, {reward_name(config.reward)}",
        "runs": [describe(log) for log in logs],
        "results": result_table(logs).rows,
        "equal_reward": equal.rows if equal else None,
        "level": f"{lowest_end(logs):.4g}",
        "findings": findings(logs),
        "events": happenings(logs),
        "curves": _curves(logs),
        "grids": _grids(logs),
        "prompts": list(dict.fromkeys(logs[0].panels[0].get("prompts", []))),
        "grids_on_the_way": [(log.name, pictures) for log in logs if (pictures := _grids_on_the_way(log))],
        "diagnostics": [_diagnostics(log) for log in logs],
        "times": _times(logs).rows,
        "differences": _differences(logs),
        "options": [(log.name, to_yaml(log.config)) for log in logs],
    }


def _curves(logs: Sequence[RunLog]) -> list[Figure]:
    reward = f"reward of the panel ({reward_name(logs[0].config.reward)})"
    figures = [
        Figure(
            interval_curves([_series(log, "reward") for log in logs], x_label=COST, y_label=reward),
            "Panel reward against the cost of training, with its 95 % interval.",
            "plot",
        )
    ]
    if all(log.metric("vendi", 0) for log in logs):
        vendi = [_series(log, "vendi") for log in logs]
        paths = [Series(line.name, log.rewards(), line.y) for line, log in zip(vendi, logs, strict=True)]
        level = lowest_end(logs) if equal_reward_table(logs) else None
        figures += [
            Figure(
                interval_curves(vendi, x_label=COST, y_label="Vendi Score of the panel"),
                "Diversity of the panel against the cost of training, with its 95 % interval.",
                "plot",
            ),
            Figure(
                frontier(paths, x_label=reward, y_label="Vendi Score of the panel", level=level),
                "Reward against diversity, from the pretrained model (hollow) panel by panel to the last (large). "
                f"Higher at equal reward{' (dotted)' if level is not None else ''} is better.",
                "plot",
            ),
        ]
    return figures


def _series(log: RunLog, metric: str) -> Series:
    value, low, high = ([panel[metric][i] for panel in log.panels] for i in range(3))
    return Series(log.name, [panel["evaluations"] for panel in log.panels], value, low, high)


def _diagnostics(log: RunLog) -> Figure:
    iterations = [record["iteration"] + 1 for record in log.metrics]
    panels = []
    for name, title in DIAGNOSTICS.items():
        values = [record[name] for record in log.metrics]
        line = Series(log.name, iterations, values)
        if name == "reward_mean":
            low, high = ([r[name] + sign * r["reward_std"] for r in log.metrics] for sign in (-1, 1))
            line = line._replace(low=low, high=high)
        panels.append((title, line))
    caption = f"{run_title(log)}: every iteration of training."
    return Figure(diagnostics(panels, x_label="iteration"), caption, "wide")


def _grids(logs: Sequence[RunLog]) -> list[Figure]:
    ends = [_grid(log, log.model, run_title(log), "grid") for log in logs if len(log.panels) > 1]
    return [_grid(logs[0], 0, "pretrained", "grid"), *ends]


def _grids_on_the_way(log: RunLog) -> list[Figure]:
    """The grids between a run's first and last panel, at most MID_RUN_GRIDS of them, evenly spread."""
    between = list(range(1, len(log.panels) - 1))
    if len(between) > MID_RUN_GRIDS:
        last = len(between) - 1
        between = [between[round(i * last / (MID_RUN_GRIDS - 1))] for i in range(MID_RUN_GRIDS)]
    return [_grid(log, panel, log.name, "small") for panel in between]


def _grid(log: RunLog, panel: int, name: str, kind: str) -> Figure:
    record = log.panels[panel]
    path = log.folder / "samples" / f"iteration-{record['iteration']:06d}.png"
    limit = SMALL_GRID_PIXELS if kind == "small" else GRID_PIXELS
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            if max(picture.size) > limit:
                picture.thumbnail((limit, limit))
                buffer = io.BytesIO()
                picture.save(buffer, format="png")
                data = buffer.getvalue()
    except OSError as error:
        raise ValueError(f"{log.folder} lacks a grid, {path}: {error}; copy the whole run folder") from error
    vendi = f", Vendi Score {record['vendi'][0]:.4g}" if "vendi" in record else ""
    caption = f"{name}, iteration {record['iteration']}: reward {record['reward'][0]:.4g}{vendi}"
    return Figure(data, caption, kind)


def _times(logs: Sequence[RunLog]) -> Table:
    totals: list[dict[str, float]] = [{} for _ in logs]
    for total, log in zip(totals, logs, strict=True):
        for record in log.metrics:
            for phase, seconds in record["seconds"].items():
                total[phase] = total.get(phase, 0.0) + seconds
    rows = [["", *(run_title(log) for log in logs)]]
    sums = [sum(total.values()) or float("nan") for total in totals]
    for phase in dict.fromkeys(phase for total in totals for phase in total):
        spent = [total.get(phase, 0.0) for total in totals]
        rows.append([phase, *(f"{part:.1f} ({part / total:.0%})" for part, total in zip(spent, sums, strict=True))])
    rows.append(["total", *(f"{seconds:.1f}" for seconds in sums)])
    for counter, title in (("images", "images trained a second"), ("evaluations", f"{COST} a second")):
        counts = [log.metrics[-1][counter] for log in logs]
        rows.append([title, *(f"{count / seconds:.4g}" for count, seconds in zip(counts, sums, strict=True))])
    return Table(rows)


def _differences(logs: Sequence[RunLog]) -> list[list[str]]:
    """A table of the options in which the runs differ; empty where they differ in none."""
    changed = dict.fromkeys(key for log in logs for key in differences(logs[0].config, log.config))
    changed.pop("run.folder", None)
    rows = [[key, *(repr(_option(log, key)) for log in logs)] for key in changed]
    return Table([["", *(log.name for log in logs)], *rows]).rows if rows else []


def _option(log: RunLog, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(log.config, section), name)
