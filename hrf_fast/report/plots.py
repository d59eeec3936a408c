"""Plots of a report: each function draws one figure and returns it as PNG bytes.

Values come in, pixels go out: which runs and panels they belong to is figures.py's. Colours are Okabe and Ito's, which
colour-blind readers tell apart; markers and line styles differ too, for print. No pyplot, so no display and no state.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
FONT, DPI, WIDTH, HEIGHT = 9, 144, 5.4, 3.5  # points, dots per inch, inches
# arms that can be told apart in one plane
TOGETHER = 8


class Series(NamedTuple):
    """One run's line: values of equal length, with the interval around each where there is one."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    x_low: list[float] | None = None
    x_high: list[float] | None = None


Arms = Sequence[tuple[str, Sequence[Series], Series]]
"""Arms of a study by name: the line of each run, and their mean."""


def interval_curves(series: Sequence[Series], *, x_label: str, y_label: str) -> bytes:
    """A line per run with its interval as a band."""
    figure, axes = _axes(x_label, y_label)
    for index, line in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(line.x, line.y, **_look(index), label=_label(line.name))
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    _legend(axes)
    return _png(figure)


def frontier(
    series: Sequence[Series], models: Sequence[int], *, x_label: str, y_label: str, level: float | None = None
) -> bytes:
    """Each run's way through the plane, from a hollow start; a dotted line marks x = `level`.

    Where a line has intervals in x and y, they are drawn as thin crosses.

    Args:
        models: the index in each line of the tuned model, which is drawn large.
    """
    figure, axes = _axes(x_label, y_label)
    for index, (line, model) in enumerate(zip(series, models, strict=True)):
        look = _look(index)
        if line.low and line.high and line.x_low and line.x_high:
            x_reach, y_reach = _reach(line.x, line.x_low, line.x_high), _reach(line.y, line.low, line.high)
            axes.errorbar(
                line.x, line.y, y_reach, x_reach, color=look["color"], linestyle="none", linewidth=0.8, alpha=0.35
            )
        axes.plot(line.x, line.y, **{**look, "markersize": 3}, label=_label(line.name))
        axes.plot([line.x[model]], [line.y[model]], **{**look, "markersize": 9})
        axes.plot(line.x[:1], line.y[:1], **{**look, "markersize": 9, "markerfacecolor": "white", "zorder": 3})
    if level is not None:
        axes.axvline(level, color="#666666", linestyle=":", linewidth=1)
    _legend(axes)
    return _png(figure)


def _reach(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """How far each interval reaches below its value and above it; 0 where rounding has put an end across."""
    below = [max(0.0, value - end) for value, end in zip(values, low, strict=True)]
    return [below, [max(0.0, end - value) for value, end in zip(values, high, strict=True)]]


def blend_front(records: Sequence[Mapping[str, Any]], *, chosen: float, keep: float) -> bytes:
    """Reward against the share of the Vendi Score over blends, each with its α; a dotted line marks `keep`.

    Args:
        records: of panels at several `alpha`, 0 among them.
    """
    in_order = sorted(records, key=lambda record: float(record["alpha"]))
    base = next(record["vendi"][0] for record in records if record["alpha"] == 0)
    x = [100 * record["vendi"][0] / base for record in in_order]
    y, low, high = ([record["reward"][i] for record in in_order] for i in range(3))
    figure, axes = _axes("Vendi Score, % of the pretrained model's", "reward")
    axes.errorbar(x, y, yerr=_reach(y, low, high), color=COLOURS[0], alpha=0.35, linestyle="none", linewidth=1)
    axes.plot(x, y, **_look(0))
    for record, a, b in zip(in_order, x, y, strict=True):
        axes.annotate(f"{record['alpha']:g}", (a, b), (4, 3), textcoords="offset points", fontsize=FONT - 2)
        if record["alpha"] == chosen:
            axes.plot([a], [b], **{**_look(1), "markersize": 9}, label=f"chosen, alpha {chosen:g}")
    axes.axvline(100 * keep, color="#666666", linestyle=":", linewidth=1)
    _legend(axes)
    return _png(figure)


def paths(panels: Sequence[tuple[str, Arms]], *, x_label: str, y_label: str, level: float) -> bytes:
    """A plane for each panel, (title, arms): of an arm thin lines for its runs and a thick mean with its end.

    y is a share, in per cent on one scale for all planes; a dotted line marks y = `level`. Two planes stand side by
    side, so that a page's column leaves them legible. Where a panel has more than TOGETHER arms, each arm has a small
    plane, with the mean of the first arm in grey.
    """
    if max(len(arms) for _, arms in panels) > TOGETHER:
        return _planes(panels, x_label=x_label, y_label=y_label, level=level)
    figure, grid = _grid(len(panels), min(2, len(panels)), 0.9 * HEIGHT if len(panels) > 1 else HEIGHT)
    for axes, (title, arms) in zip(grid, panels, strict=True):
        for index, (name, runs, mean) in enumerate(arms):
            _arm(axes, runs, mean, _look(index), width=2.4, end=8, label=_label(name))
        axes.set_title(_label(title), fontsize=FONT)
        _legend(axes)
    return _shares(figure, grid, x_label=x_label, y_label=y_label, level=level)


def _planes(panels: Sequence[tuple[str, Arms]], *, x_label: str, y_label: str, level: float) -> bytes:
    """`paths` with a small plane for each arm, in rows of four; those of a panel have one x axis."""
    planes = [(title, arms[0][2], *arm) for title, arms in panels for arm in arms]
    figure, grid = _grid(len(planes), 4, 0.4 * HEIGHT, sharex=len(panels) == 1)
    leading: dict[str, Axes] = {}
    for axes, (title, first, name, runs, mean) in zip(grid, planes, strict=True):
        if leading.setdefault(title, axes) is not axes:
            axes.sharex(leading[title])
        axes.plot(first.x, first.y, color="#999999", linewidth=2.4)
        _arm(axes, runs, mean, _look(0), width=1.6, end=4)
        axes.set_title(_label(name if len(panels) == 1 else f"{title}, {name}"), fontsize=FONT - 1)
    return _shares(figure, grid, x_label=x_label, y_label=y_label, level=level)


def _grid(count: int, columns: int, height: float, *, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `count` planes with one y axis, in rows of `columns` that are `height` inches high."""
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH if columns == 1 else 1.5 * WIDTH, height * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=True).ravel())
    for axes in grid[count:]:
        axes.set_visible(False)
    # the lowest plane of each column, above an empty cell too
    for axes in grid[:count][-columns:]:
        axes.tick_params(labelbottom=True)
    return figure, grid[:count]


def _shares(figure: Figure, grid: Sequence[Axes], *, x_label: str, y_label: str, level: float) -> bytes:
    """Finish planes whose common y axis is a share."""
    for axes in grid:
        axes.axhline(level, color="#666666", linestyle=":", linewidth=1)
        _tidy(axes)
    # planes that share an axis share its formatter
    grid[0].yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    figure.supxlabel(_label(x_label), fontsize=FONT)
    figure.supylabel(_label(y_label), fontsize=FONT)
    return _png(figure)


def _arm(
    axes: Axes,
    runs: Sequence[Series],
    mean: Series,
    look: dict[str, Any],
    *,
    width: float,
    end: float,
    label: str | None = None,
) -> None:
    for line in runs:
        axes.plot(line.x, line.y, color=look["color"], linestyle=look["linestyle"], linewidth=0.6, alpha=0.6)
    axes.plot(mean.x, mean.y, **{**look, "linewidth": width, "marker": ""}, label=label)
    axes.plot(mean.x[-1:], mean.y[-1:], **{**look, "markersize": end})


def window_bars(counts: Sequence[tuple[int, int, int, int]], *, steps: int, title: str) -> bytes:
    """Bars of (iteration, start, stop, groups) over the steps [start, stop), the noisiest of the `steps` on top.

    A dot marks the start; its area grows with the groups.
    """
    figure, axes = _axes("iteration", "trained steps")
    iterations, starts, stops, groups = zip(*counts, strict=True)
    largest, span = max(groups), max(iterations) - min(iterations) + 1
    # those of neighbouring iterations do not touch
    width = min(5.0, 0.5 * 72 * WIDTH / span)
    first, last = ([value - 0.5 for value in ends] for ends in (starts, stops))
    axes.vlines(iterations, first, last, color=COLOURS[0], linewidth=width, alpha=0.25)
    axes.scatter(iterations, starts, s=[4 + 26 * count / largest for count in groups], color=COLOURS[0], linewidths=0)
    axes.set_ylim(steps - 0.5, -0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(_label(title), fontsize=FONT)
    return _png(figure)


def diagnostics(panels: Sequence[tuple[str, Series]], *, x_label: str) -> bytes:
    """Small panels in two columns, (title, series) each; the interval is drawn as a band."""
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(1.5 * WIDTH, 0.6 * HEIGHT * rows), layout="constrained")
    for number, (title, line) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, 2, number)
        axes.plot(line.x, line.y, color=COLOURS[0], linewidth=1.2, marker="." if len(line.x) < 30 else None)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=COLOURS[0], alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize=FONT)
        axes.set_xlabel(x_label, fontsize=FONT)
        _tidy(axes)
    return _png(figure)


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(_label(x_label), fontsize=FONT)
    axes.set_ylabel(_label(y_label), fontsize=FONT)
    _tidy(axes)
    return figure, axes


def _look(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
        "markersize": 4,
        "linewidth": 1.4,
    }


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT - 1)
    axes.yaxis.get_offset_text().set_fontsize(FONT - 1)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)


def _legend(axes: Axes) -> None:
    # a case without a finished run has nothing to name
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=FONT - 1, frameon=False)


def _label(text: str) -> str:
    """Text as it stands: $ would start mathematics, and a leading _ hides a line from the legend."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # a name in a script that the font lacks is drawn as boxes; the page's text has it
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
