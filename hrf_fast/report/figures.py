"""Figures of the page: which panels and iterations of which runs each picture is of, with its caption."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from hrf_fast.report.comparison import RunLog, crossing, lowest_end, shared_held_out
from hrf_fast.report.plots import Series, diagnostics, frontier, interval_curves, window_bars
from hrf_fast.report.strip import open_grid
from hrf_fast.report.tables import equal_reward_table, run_title
from hrf_fast.run.card import reward_name
from hrf_fast.run.files import HELD_OUT, intervals_of
from hrf_fast.run.layout import RunFiles

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
    """A PNG on the page: `kind` is the class that sizes it (front, plot, wide, grid, small)."""

    png: bytes
    caption: str
    kind: str

    @property
    def source(self) -> str:
        """The picture as a data URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def front(logs: Sequence[RunLog]) -> Figure | None:
    """Every run's way through the plane of reward and diversity; None without Vendi Scores."""
    if not _have_vendi(logs):
        return None
    level = lowest_end(logs) if equal_reward_table(logs) else None
    picture = frontier(
        [_way(log) for log in logs],
        [log.model for log in logs],
        x_label=_reward(logs),
        y_label="Vendi Score of the panel",
        level=level,
    )
    return Figure(
        picture,
        "Reward against diversity, from the pretrained model (hollow) panel by panel, the tuned model large, with "
        f"95 % intervals. Higher at equal reward{' (dotted)' if level is not None else ''} is better.",
        "front",
    )


def curves(logs: Sequence[RunLog]) -> list[Figure]:
    """Reward, held-out rewards and diversity of the panels against the cost of training."""
    rewards = [_series(log, "reward") for log in logs]
    figures = [
        Figure(
            interval_curves(rewards, x_label=COST, y_label=_reward(logs)),
            "Panel reward against the cost of training, with its 95 % interval.",
            "plot",
        )
    ]
    for name in shared_held_out(logs):
        title = f"held-out reward of the panel ({name.removeprefix(HELD_OUT)})"
        picture = interval_curves([_series(log, name) for log in logs], x_label=COST, y_label=title)
        figures.append(Figure(picture, f"A {title}, which nothing trains on, with its 95 % interval.", "plot"))
    if _have_vendi(logs):
        vendi = interval_curves(
            [_series(log, "vendi") for log in logs], x_label=COST, y_label="Vendi Score of the panel"
        )
        caption = "Diversity of the panel against the cost of training, with its 95 % interval."
        figures.append(Figure(vendi, caption, "plot"))
    return figures


def training(log: RunLog) -> Figure:
    """Numbers of every iteration of training."""
    iterations = [record["iteration"] + 1 for record in log.metrics]
    panels = []
    for name, title in DIAGNOSTICS.items():
        values = [record[name] for record in log.metrics]
        line = Series(log.name, iterations, values)
        if name == "reward_mean":
            low, high = ([r[name] + sign * r["reward_std"] for r in log.metrics] for sign in (-1, 1))
            line = line._replace(low=low, high=high)
        panels.append((title, line))
    if (signal := _signal(log)) is not None:
        panels.append(("signal over noise of a step's gradient, so far", signal))
    caption = f"{run_title(log)}: every iteration of training."
    return Figure(diagnostics(panels, x_label="iteration"), caption, "wide")


def windows(logs: Sequence[RunLog]) -> list[Figure]:
    """Each run's windows, by iteration; a run without the numbers has none."""
    figures = []
    for log in logs:
        counts = [
            (record["iteration"] + 1, *window, count)
            for record in log.metrics
            for window, count in sorted(Counter(_windows_of(record)).items())
        ]
        if counts:
            steps = log.config.sample.num_inference_steps
            figures.append(
                Figure(
                    window_bars(counts, steps=steps, title=log.name),
                    f"{run_title(log)}: the trained steps of every group's window, 0 the noisiest of {steps}. A dot is "
                    "where windows start, and a larger one is more groups.",
                    "plot",
                )
            )
    return figures


def _windows_of(record: Mapping[str, Any]) -> list[tuple[int, int]]:
    """First step and end of every group's window; an older version's run has no ends, and one step stands for all."""
    starts = record.get("window_starts", [])
    return list(zip(starts, record.get("window_stops", [start + 1 for start in starts]), strict=True))


def grids(logs: Sequence[RunLog]) -> list[Figure]:
    """The pretrained panel and each run's panel next to its first crossing of the shared level; alone, its end."""
    chosen = [(log, _at_level(logs, log)) for log in logs if len(log.panels) > 1]
    return [
        _grid(logs[0], 0, "pretrained", "grid"),
        *(_grid(log, panel, run_title(log), "grid") for log, panel in chosen),
    ]


def last_grids(logs: Sequence[RunLog]) -> list[Figure]:
    """Each run's end, where `grids` shows an earlier panel of any."""
    after = [log for log in logs if len(log.panels) > 1]
    if all(_at_level(logs, log) == log.model % len(log.panels) for log in after):
        return []
    return [_grid(log, log.model, run_title(log), "grid") for log in after]


def grids_on_the_way(log: RunLog) -> list[Figure]:
    """The grids between a run's first and last panel, at most MID_RUN_GRIDS of them, evenly spread."""
    between = list(range(1, len(log.panels) - 1))
    if len(between) > MID_RUN_GRIDS:
        last = len(between) - 1
        between = [between[round(i * last / (MID_RUN_GRIDS - 1))] for i in range(MID_RUN_GRIDS)]
    return [_grid(log, panel, log.name, "small") for panel in between]


def _at_level(logs: Sequence[RunLog], log: RunLog) -> int:
    """The tuned panel nearest to the level of equal reward, of the two around its first crossing; without one, the end.

    The later panel at a tie.
    """
    rewards, level = log.rewards(), lowest_end(logs)
    crossed = crossing(rewards, level)
    if len(logs) < 2 or equal_reward_table(logs) is None or crossed is None:
        return log.model % len(log.panels)
    after, _ = crossed
    return min(range(max(1, after - 1), after + 1), key=lambda i: (abs(rewards[i] - level), -i))


def _have_vendi(logs: Sequence[RunLog]) -> bool:
    return all(log.metric("vendi", 0) for log in logs)


def _reward(logs: Sequence[RunLog]) -> str:
    return f"reward of the panel ({reward_name(logs[0].config.reward)})"


def _series(log: RunLog, metric: str) -> Series:
    value, low, high = ([intervals_of(panel)[metric][i] for panel in log.panels] for i in range(3))
    return Series(log.name, [panel["evaluations"] for panel in log.panels], value, low, high)


def _way(log: RunLog) -> Series:
    """A run's panels in the plane of reward and Vendi Score."""
    reward, vendi = _series(log, "reward"), _series(log, "vendi")
    return vendi._replace(x=reward.y, x_low=reward.low, x_high=reward.high)


def _signal(log: RunLog) -> Series | None:
    """Signal over noise of an optimizer step's gradient, both summed up to each iteration; None where not logged.

    The noise is one group's, so a step of n groups has n times the ratio: see `training.gradient_noise`.
    """
    measured = [record for record in log.metrics if {"gradient_signal", "gradient_noise"} <= record.keys()]
    signal, noise = (list(accumulate(r[f"gradient_{name}"] for r in measured)) for name in ("signal", "noise"))
    if not measured or not all(noise):
        return None
    ratios = [log.config.train.groups_per_step * s / n for s, n in zip(signal, noise, strict=True)]
    return Series(log.name, [record["iteration"] + 1 for record in measured], ratios)


def _grid(log: RunLog, panel: int, name: str, kind: str) -> Figure:
    record: dict[str, Any] = log.panels[panel]
    limit = SMALL_GRID_PIXELS if kind == "small" else GRID_PIXELS
    picture = open_grid(log, panel)
    if max(picture.size) > limit:
        picture.thumbnail((limit, limit))
        buffer = io.BytesIO()
        picture.save(buffer, format="png")
        data = buffer.getvalue()
    else:
        data = RunFiles(log.folder).grid(record["iteration"]).read_bytes()
    vendi = f", Vendi Score {record['vendi'][0]:.4g}" if "vendi" in record else ""
    caption = f"{name}, iteration {record['iteration']}: reward {record['reward'][0]:.4g}{vendi}"
    return Figure(data, caption, kind)
