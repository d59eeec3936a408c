"""Report: one HTML page about one run or several that started from the same pretrained model.

The page needs no other file, no script and no network, and prints. Its numbers are comparison.py's, its figures
plots.py's; here they are laid out.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from hrf_fast.config.load import differences, to_yaml
from hrf_fast.report.comparison import (
    RunLog,
    Table,
    describe,
    equal_reward_table,
    findings,
    lowest_end,
    read_runs,
    result_table,
    reward_name,
    run_title,
)
from hrf_fast.report.plots import Series, diagnostics, frontier, interval_curves
from hrf_fast.run.files import write_atomically

MID_RUN_GRIDS = 5
GRID_PIXELS, SMALL_GRID_PIXELS = 1024, 384  # larger grids are shrunk, so that the page opens at once
COST = "UNet evaluations"
DIAGNOSTICS = {
    "reward_mean": "reward, mean ± std of the training samples",
    "approx_kl": "approx_kl, old to new policy",
    "clip_fraction": "clip_fraction",
    "grad_norm": "grad_norm, before clipping",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc }
h3 { font-size: 1rem; margin: 1rem 0 .3rem } table { border-collapse: collapse; margin: .8rem 0 }
th, td { padding: .25rem 1rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
td { font-variant-numeric: tabular-nums } li { overflow-wrap: anywhere } .scroll { overflow-x: auto }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start } figure { margin: 0; break-inside: avoid }
.plot { flex: 1 1 26rem; max-width: 34rem } .wide { width: 100% } .grid { flex: 1 1 16rem; max-width: 32rem }
.small { flex: 0 1 12rem } img { width: 100%; height: auto } figcaption { font-size: .85rem; color: #444 }
pre { font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere }
@media print { body { margin: 0; max-width: none; font-size: 11px } h2, h3 { break-after: avoid } }
"""


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
    """The page's runs, tables of scores and findings as plain text.

    Raises:
        ValueError: as `write_report`, except for grids.
    """
    logs = read_runs(runs)
    lines = [*map(describe, logs), "", *result_table(logs).lines(), ""]
    if equal := equal_reward_table(logs):
        lines += [f"at equal reward, {lowest_end(logs):.4g}:", *equal.lines(), ""]
    return lines + findings(logs)


def _page(logs: Sequence[RunLog]) -> str:
    config = logs[0].config
    title = f"{' vs '.join(log.name for log in logs)}: {config.model.name}, {reward_name(config)}"
    body = [_tag("h1", title), _list(map(describe, logs)), "<h2>Scores</h2>", _table(result_table(logs))]
    if equal := equal_reward_table(logs):
        body += [
            "<h2>At equal reward</h2>",
            _tag(
                "p",
                f"Where each run's panel reward first reaches {lowest_end(logs):.4g}, the smallest of their last ones. "
                "Values and intervals are interpolated linearly between panels.",
            ),
            _table(equal),
        ]
    body += ["<h2>What this shows</h2>", _list(findings(logs)), "<h2>Curves</h2>", _curves(logs)]
    body += ["<h2>Images from equal noise</h2>", _grids(logs), "<h2>Training</h2>", *map(_diagnostics, logs)]
    body += ["<h2>Time</h2>", "<p>Seconds of training; panels and saving are not counted.</p>", _table(_times(logs))]
    body += ["<h2>Options</h2>", *_options(logs)]
    # the policy makes sure of what the docstring says: a browser loads and runs nothing
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{_tag('title', title)}<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _curves(logs: Sequence[RunLog]) -> str:
    reward = f"reward of the panel ({reward_name(logs[0].config)})"
    figures = [
        _figure(
            interval_curves([_series(log, "reward") for log in logs], x_label=COST, y_label=reward),
            "Panel reward against the cost of training, with its 95 % interval.",
            "plot",
        )
    ]
    if all(log.score("vendi", 0) for log in logs):
        vendi = [_series(log, "vendi") for log in logs]
        paths = [Series(line.name, log.rewards(), line.y) for line, log in zip(vendi, logs, strict=True)]
        level = lowest_end(logs) if equal_reward_table(logs) else None
        figures += [
            _figure(
                interval_curves(vendi, x_label=COST, y_label="Vendi Score of the panel"),
                "Diversity of the panel against the cost of training, with its 95 % interval.",
                "plot",
            ),
            _figure(
                frontier(paths, x_label=reward, y_label="Vendi Score of the panel", level=level),
                "Reward against diversity, from the pretrained model (hollow) panel by panel to the last (large). "
                f"Higher at equal reward{' (dotted)' if level is not None else ''} is better.",
                "plot",
            ),
        ]
    return _row(figures)


def _series(log: RunLog, score: str) -> Series:
    value, low, high = ([panel[score][i] for panel in log.panels] for i in range(3))
    return Series(log.name, [panel["evaluations"] for panel in log.panels], value, low, high)


def _diagnostics(log: RunLog) -> str:
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
    return _figure(diagnostics(panels, x_label="iteration"), caption, "wide")


def _grids(logs: Sequence[RunLog]) -> str:
    first = logs[0]
    grids = [_grid(first, 0, "pretrained", "grid")]
    grids += [_grid(log, -1, run_title(log), "grid") for log in logs if len(log.panels) > 1]
    rows = ["<p>The same place in every grid starts from the same noise.</p>", _row(grids)]
    for log in logs:
        between = list(range(1, len(log.panels) - 1))
        if len(between) > MID_RUN_GRIDS:
            last = len(between) - 1
            between = [between[round(i * last / (MID_RUN_GRIDS - 1))] for i in range(MID_RUN_GRIDS)]
        if between:
            rows += [_tag("h3", f"{log.name} on the way"), _row(_grid(log, i, log.name, "small") for i in between)]
    return "\n".join(rows)


def _grid(log: RunLog, panel: int, name: str, kind: str) -> str:
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
    return _figure(data, caption, kind)


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
        rows.append([phase, *(f"{part:.1f} ({part / whole:.0%})" for part, whole in zip(spent, sums, strict=True))])
    rows.append(["total", *(f"{seconds:.1f}" for seconds in sums)])
    for counter, title in (("images", "images trained a second"), ("evaluations", f"{COST} a second")):
        counts = [log.metrics[-1][counter] for log in logs]
        rows.append([title, *(f"{count / seconds:.4g}" for count, seconds in zip(counts, sums, strict=True))])
    return Table(rows)


def _options(logs: Sequence[RunLog]) -> list[str]:
    changed = dict.fromkeys(key for log in logs for key in differences(logs[0].config, log.config))
    changed.pop("run.folder", None)
    parts = []
    if changed:
        rows = [[key, *(repr(_option(log, key)) for log in logs)] for key in changed]
        parts = [_tag("p", "In what the runs differ:"), _table(Table([["", *(log.name for log in logs)], *rows]))]
    for log in logs:
        parts.append(f"<details>{_tag('summary', f'all of {log.name}')}{_tag('pre', to_yaml(log.config))}</details>")
    return parts


def _option(log: RunLog, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(log.config, section), name)


def _tag(name: str, text: str) -> str:
    return f"<{name}>{escape(text)}</{name}>"


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(_tag('li', line) for line in lines)}</ul>"


def _table(table: Table) -> str:
    # the first row and the first column are headings
    rows = [[_tag("td" if i and j else "th", cell) for j, cell in enumerate(row)] for i, row in enumerate(table.rows)]
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{lines}</table></div>'


def _figure(png: bytes, caption: str, kind: str) -> str:
    image = f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(caption)}">'
    return f'<figure class="{kind}">{image}{_tag("figcaption", caption)}</figure>'


def _row(figures: Iterable[str]) -> str:
    return f'<div class="row">{"".join(figures)}</div>'
