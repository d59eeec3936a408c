"""Training memory: peak over the window's length and over T, for every compute.activations mode.

    hrf bench memory                          # the shipped model
    hrf bench memory --model cifar --lengths 1 4 16 39
    hrf bench memory --quick                  # does it run? its figures mean nothing

Every point is a training process of its own on one group, in its second iteration. `saved` is what autograd holds for
the backward at its peak, each storage once and weights left out; the stored window, of which the UNet sees views, is in
it. It is exact and the same on every machine, but does not see inside a checkpointed block. `peak` is the process's
resident set above its imports, or the allocator's peak on CUDA: weights, gradients and optimizer included. `latents` is
the stored window alone. Writes memory.json, memory.md and memory.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import describe, machine
from benchmarks.tables import markdown_table
from benchmarks.training_bench.configurations import Row, base_words
from benchmarks.training_bench.models import MODELS, make_model
from benchmarks.training_bench.workers import Worker, WorkerError
from hrf_fast.devices import choose_device
from hrf_fast.registry import nearest

# compute.activations, each in the order of updates that it needs
MODES = {
    "keep": {"compute.activations": "keep", "train.order": "on_policy"},
    "replay": {"compute.activations": "replay", "train.order": "collect"},
    "checkpoint": {"compute.activations": "checkpoint", "train.order": "collect"},
}
# the window of the sweep over T
_LENGTH = 4


def measure_mode(
    mode: str, sweeps: Sequence[tuple[str, int, int]], folder: Path, arguments: argparse.Namespace, bar: tqdm
) -> list[dict[str, Any]]:
    """One training process per point (sweep, window length, T).

    Raises:
        WorkerError: a process failed, or refused.
    """
    options = Row(mode, MODES[mode]).words
    model = make_model(arguments.model, folder, 0)
    known: dict[tuple[int, int], dict[str, Any]] = {}
    points = []
    for sweep, length, steps in sweeps:
        if (length, steps) not in known:
            point_folder = folder / f"{mode}-{length}-{steps}"
            known[length, steps] = measure_point(model, options, length, steps, point_folder, arguments)
        points.append({"sweep": sweep, "mode": mode, **known[length, steps]})
        bar.update()
    return points


def measure_point(
    model: str, options: list[str], length: int, steps: int, folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train with a window of `length` steps of T = `steps`; the second iteration's memory."""
    size = arguments.group_size
    # the last step of T is deterministic and in no window
    start = steps - 1 - length
    words = base_words(
        model, steps=steps, groups=1, group_size=size, device=arguments.device, seed=0, schedule="clusters"
    )
    words += [f"window.kwargs.clusters=[{{steps: [{start}]}}]", *options]
    worker = Worker("ours", words, folder=folder, threads=arguments.threads or 1, saved=True)
    try:
        shape = worker.ready()["latent_shape"]
        report = worker.iterate()
    finally:
        worker.stop()
    values = shape[0] * shape[1] * shape[2]
    return {
        "length": length,
        "steps": steps,
        "saved_bytes": report["saved_bytes"],
        "latents_bytes": (length + 1) * size * values * 4,
        "peak_bytes": report["peak_bytes"],
    }


def findings(points: Sequence[dict[str, Any]], mode: str) -> dict[str, float]:
    """Summarise a mode's saved bytes: a line over the length, the share of a short window, the spread over T."""
    lengths = _series(points, mode, "length")
    summary: dict[str, float] = {}
    if len(lengths) > 2:
        x, y = [p["length"] for p in lengths], [p["saved_bytes"] for p in lengths]
        slope, at_zero = statistics.linear_regression(x, y)
        off = max(abs(b - at_zero - slope * a) for a, b in zip(x, y, strict=True))
        summary |= {"bytes_per_step": slope, "largest_off_line": off / max(y)}
        short = [p for p in lengths if p["length"] == _LENGTH]
        if short:
            summary["share_of_longest"] = short[0]["saved_bytes"] / y[-1]
    over = [p["saved_bytes"] for p in _series(points, mode, "steps")]
    if len(over) > 1:
        summary["spread_over_steps"] = max(over) / min(over) - 1
    return summary


def _series(points: Sequence[dict[str, Any]], mode: str, sweep: str) -> list[dict[str, Any]]:
    return [point for point in points if point["mode"] == mode and point["sweep"] == sweep]


def markdown(result: dict[str, Any]) -> str:
    """Both sweeps as tables, in MB, and a line per mode."""
    settings = result["settings"]
    title = f"### Training memory of {settings['model']}, one group of {settings['group_size']}"
    parts = [title, describe(result["machine"])]
    for sweep, column in (("length", f"window length at T {settings['steps']}"), ("steps", f"T, window {_LENGTH}")):
        by_mode = {mode: series for mode in MODES if (series := _series(result["points"], mode, sweep))}
        if by_mode:
            parts.append(_sweep_table(column, sweep, by_mode))
    lines = [f"- {mode}: {line}" for mode, summary in result["findings"].items() if (line := _sentence(summary))]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])]) + "\n"


def _sweep_table(column: str, sweep: str, by_mode: dict[str, list[dict[str, Any]]]) -> str:
    head = [column, "latents MB", *(f"{mode}: {what} MB" for mode in by_mode for what in ("saved", "peak"))]
    rows = []
    for points in zip(*by_mode.values(), strict=True):
        cells = [str(points[0][sweep]), f"{points[0]['latents_bytes'] / 1e6:.2f}"]
        for point in points:
            cells += [f"{point['saved_bytes'] / 1e6:.1f}", f"{point['peak_bytes'] / 1e6:.0f}"]
        rows.append(cells)
    return markdown_table(head, rows)


def _sentence(summary: dict[str, float]) -> str:
    parts = []
    if "bytes_per_step" in summary:
        line = f"{summary['bytes_per_step'] / 1e6:.1f} MB a window step, at most {summary['largest_off_line']:.1%} off"
        parts.append(f"{line} the line")
    if "share_of_longest" in summary:
        parts.append(f"{_LENGTH} steps need {summary['share_of_longest']:.3f} of the longest window")
    if "spread_over_steps" in summary:
        parts.append(f"over T it varies by {summary['spread_over_steps']:.1%}")
    return "; ".join(parts)


def plot(result: dict[str, Any], path: Path) -> None:
    """Saved and peak memory over the window's length, and saved over T."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("length", "saved_bytes", "window length"), ("length", "peak_bytes", "window length"))
    axes = figure.subplots(1, 3)
    for axis, (sweep, value, label) in zip(axes, (*panels, ("steps", "saved_bytes", "T")), strict=True):
        for mode in MODES:
            series = _series(result["points"], mode, sweep)
            axis.plot([p[sweep] for p in series], [p[value] / 1e6 for p in series], marker="o", label=mode)
        axis.set(xlabel=label, ylabel="MB", ylim=(0, None), title=f"{value.removesuffix('_bytes')} memory")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments with their defaults filled in.

    Raises:
        ValueError: names the argument, its value and the rule.
    """
    parser = argparse.ArgumentParser(
        prog="hrf bench memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help=f"of {', '.join(MODELS)}; default fashion")
    parser.add_argument("--modes", nargs="+", default=list(MODES), help=f"of {', '.join(MODES)}")
    parser.add_argument("--steps", type=int, default=40, help="T of the sweep over lengths")
    parser.add_argument("--lengths", type=int, nargs="+", help="of windows; default 1 to T − 1, the longest there is")
    parser.add_argument("--sweep", type=int, nargs="+", default=[10, 20, 40, 80], help="values of T")
    parser.add_argument("--group-size", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; default 1")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of memory.json, .md and .png")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few points, to see that everything runs")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.model, arguments.steps, arguments.group_size = arguments.model or "tiny", 10, 2
        arguments.lengths, arguments.sweep = arguments.lengths or [1, _LENGTH, 9], [10, 20]
    arguments.model = arguments.model or "fashion"
    if arguments.steps < 3:
        raise ValueError(f"--steps is {arguments.steps}; use at least 3")
    longest = arguments.steps - 1
    arguments.lengths = sorted({*(arguments.lengths or [n for n in (1, 2, 4, 8, 16, 32) if n < longest] + [longest])})
    for name, known in (("model", MODELS), ("modes", MODES)):
        value = getattr(arguments, name)
        for each in [value] if isinstance(value, str) else value:
            if each not in known:
                raise ValueError(f"--{name} has {each!r}{nearest(each, known)}; use {', '.join(known)}")
    if not 1 <= arguments.lengths[0] <= arguments.lengths[-1] <= longest:
        raise ValueError(f"--lengths is {arguments.lengths}; at T {arguments.steps} use 1 to {longest}")
    if min(arguments.sweep) <= _LENGTH:
        raise ValueError(f"--sweep is {arguments.sweep}; its window has {_LENGTH} steps, so use at least {_LENGTH + 1}")
    if arguments.group_size < 2:
        raise ValueError(f"--group-size is {arguments.group_size}; use at least 2")
    arguments.device = choose_device(arguments.device)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write memory.json, memory.md and memory.png.

    Raises:
        ValueError: an argument, or a training process that failed.
    """
    arguments = parse(argv)
    points: list[dict[str, Any]] = []
    sweeps = [("length", length, arguments.steps) for length in arguments.lengths]
    sweeps += [("steps", _LENGTH, steps) for steps in arguments.sweep]
    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(total=len(arguments.modes) * len(sweeps), unit="point") as bar,
    ):
        for mode in arguments.modes:
            bar.set_postfix_str(mode)
            try:
                points += measure_mode(mode, sweeps, Path(temporary), arguments, bar)
            except WorkerError as error:
                raise ValueError(f"{mode}: {error}") from error
    result = {
        "machine": machine(arguments.device, arguments.threads or 1),
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("out", "device")},
        "points": points,
        "findings": {mode: findings(points, mode) for mode in arguments.modes if _series(points, mode, "length")},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "memory.json").write_text(json.dumps(result, indent=1))
    (arguments.out / "memory.md").write_text(markdown(result))
    plot(result, arguments.out / "memory.png")
    print(markdown(result), end="")
