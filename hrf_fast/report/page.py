"""Report: one HTML page about one run or several that started from the same pretrained model.

The page needs no other file, no script and no network, and prints. Here its values are prepared, from comparison.py's
numbers, tables.py's tables and plots.py's figures; page.html.j2 lays them out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hrf_fast.config.credentials import without_credentials
from hrf_fast.config.load import differences, to_yaml
from hrf_fast.report.comparison import RunLog, lowest_end, read_runs
from hrf_fast.report.figures import COST, curves, front, grids, grids_on_the_way, last_grids, training, windows
from hrf_fast.report.tables import Table, equal_reward_table, findings, happenings, result_table, run_line, run_title
from hrf_fast.run.card import reward_name
from hrf_fast.run.files import write_atomically

TEMPLATE = "page.html.j2"
SIGNAL = "signal.json"
"""The file that `hrf bench signal --out RUN` writes into a run folder."""


def write_report(runs: list[Path], out: Path | None = None, *, names: Sequence[str] = ()) -> Path:
    """Write the page about `runs`.

    Args:
        runs: run folders; the iteration-0 panel of the first is the pretrained model's.
        out: the HTML file; report.html in the first run by default.
        names: of the runs, as in `read_runs`.

    Returns:
        The file written.

    Raises:
        ValueError: a folder lacks a grid, or as `read_runs`.
    """
    logs = read_runs(runs, names)
    out = out or logs[0].folder / "report.html"
    if out.is_dir():
        raise ValueError(f"the report can't be written to {out}, which is a folder; name an HTML file")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, _page(logs).encode())
    return out


def summary_lines(runs: list[Path], *, names: Sequence[str] = ()) -> list[str]:
    """The page's runs, tables of metrics, findings and events as plain text.

    Raises:
        ValueError: as `read_runs`.
    """
    logs = read_runs(runs, names)
    lines = [*map(run_line, logs), "", *result_table(logs).lines(), ""]
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
        "runs": [run_line(log) for log in logs],
        "results": result_table(logs).rows,
        "equal_reward": equal.rows if equal else None,
        "level": f"{lowest_end(logs):.4g}",
        "findings": findings(logs),
        "events": happenings(logs),
        "front": front(logs),
        "curves": curves(logs),
        "windows": windows(logs),
        "signals": [(log.name, rows) for log in logs if (rows := _signal_by_start(log))],
        "grids": grids(logs),
        "last_grids": last_grids(logs),
        "prompts": list(dict.fromkeys(logs[0].panels[0].get("prompts", []))),
        "grids_on_the_way": [(log.name, pictures) for log in logs if (pictures := grids_on_the_way(log))],
        "diagnostics": [training(log) for log in logs],
        "times": _times(logs).rows,
        "differences": _differences(logs),
        "options": [(log.name, to_yaml(log.config, credentials=False)) for log in logs],
    }


def _signal_by_start(log: RunLog) -> list[list[str]]:
    """Tabulate what `hrf bench signal` has measured into the run's folder; empty where it has not.

    Raises:
        ValueError: the file is none of its.
    """
    path = log.folder / SIGNAL
    if not path.is_file():
        return []
    try:
        results = json.loads(path.read_text())["results"]
        cells = [[r["start"], r["groups"], *(f"{r[name]:.3g}" for name in ("equal", "std"))] for r in results]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not what `hrf bench signal` writes ({error!r}); measure again, or delete it"
        ) from error
    head = ["start", "groups measured", "equal weights", "train.step_weights=std"]
    return Table([head, *([str(cell) for cell in row] for row in cells)]).rows


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
    return without_credentials(getattr(getattr(log.config, section), name))
