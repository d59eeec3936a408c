"""Rows measured in turns: worker processes, the check against the first row, rounds and their medians."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.training_bench.configurations import Row
from benchmarks.training_bench.workers import OutOfTime, Worker, WorkerError, start_worker

# iterations that are compared with the first row's before anything is timed; they warm up too
CHECKED = 3
# largest difference of a weight; and of all weights, over how far they have moved
WEIGHT_TOLERANCE, MOVE_TOLERANCE = 1e-5, 1e-2
# of the loss, per window step: rounding of log-probs near a ratio of 1
LOSS_TOLERANCE = 1e-5


class Different(ValueError):
    """A row that promises the literal loop's numbers has others."""


def note(text: str) -> None:
    """Show the user a line without breaking a progress bar."""
    tqdm.write(text, file=sys.stderr)


def measure(
    table: Sequence[tuple[Row, list[str]]],
    *,
    where: str,
    folder: Path,
    threads: int,
    rounds: int,
    per_round: int,
    images: int,
    clock: str,
    advance: Callable[[int, str], None],
    until: float = math.inf,
    left_out: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Start a worker per row, check them, and time them in turns.

    Args:
        table: rows and their configurations; the first one is the baseline.
        where: model and method, for messages.
        rounds: how often each row has its turn; per_round: iterations in a turn, of `images` trained images each.
        clock: wall, or cpu for the time that a worker has a processor for.
        advance: called with iterations done and what is going on.
        until: the time.monotonic() to be done by. Rows after the first have two thirds of the time to start, and
            another round is begun only where the longest one would fit.
        left_out: takes a sentence for each row that could not start.

    Returns:
        One summary per row that could start; the others are named on the console.

    Raises:
        Different: a row differs from the literal loop, the baseline, though it promises not to; nothing was timed.
        OutOfTime: no round would end in time; ValueError: a worker failed, or the baseline could not start.
    """
    others_until = time.monotonic() + (until - time.monotonic()) * 2 / 3
    started: dict[int, Worker] = {}
    able: dict[int, tuple[Row, Worker]] = {}

    def start(index: int) -> Worker:
        row, words = table[index]
        return start_worker(row, words, folder=folder / str(index), threads=threads)

    try:
        # one after another, so that a compilation has the machine to itself; but together on a GPU's machine, which has
        # cores to spare: imports and the choice of convolutions take a minute, a compilation several
        if torch.cuda.is_available():
            started.update((index, start(index)) for index in range(len(table)))
        for index, (row, _) in enumerate(table):
            advance(0, f"{where}: starting {row.name}")
            if index not in started:
                started[index] = start(index)
            worker = started[index]
            try:
                worker.ready(others_until if index else until)
            except WorkerError as error:
                late = isinstance(error, OutOfTime)
                if late and index == 0:
                    raise
                if not late and (index == 0 or not error.refused):
                    raise ValueError(f"{where}, {row.name}: {error}") from error
                worker.stop()
                note(f"{where}: skipped {row.name!r}: {error}")
                if left_out is not None:
                    left_out.append(f"{row.name}: {error}")
                advance(CHECKED + rounds * per_round, "")
                continue
            advance(1, "")
            able[index] = row, worker
        workers = [able[index] for index in sorted(able)]
        if len(workers) < 2 <= len(table) and time.monotonic() >= others_until:
            raise OutOfTime("no row beside the first one could start in time")
        began = time.monotonic()
        checked = _check(workers, where, advance)
        turns: list[list[dict[str, Any]]] = [[] for _ in workers]
        # the check has made at least one iteration of each; a turn has bare calls too
        longest = 2 * per_round * (time.monotonic() - began) / (CHECKED - 1)
        for number in range(rounds):
            began = time.monotonic()
            if began + longest > until:
                if number == 0:
                    raise OutOfTime("there was no time left for a round")
                note(f"{where}: {number} of {rounds} rounds: time was up")
                break
            # every other round backwards: a drift of the machine favours nobody
            for index in sorted(range(len(workers)), reverse=number % 2 == 1):
                row, worker = workers[index]
                advance(0, f"{where}: round {number + 1} of {rounds}, {row.name}")
                turns[index].append(_turn(worker, per_round, clock, bare=row.kind == "ours"))
                advance(per_round, "")
            longest = max(longest, time.monotonic() - began)
    except OutOfTime as error:
        raise OutOfTime(f"{where}: {error}") from error
    except WorkerError as error:
        raise ValueError(f"{where}: {error}") from error
    finally:
        for worker in started.values():
            worker.stop()
    results = [
        _summary(row, row_turns, images * per_round) | {"check": checked.get(row.name)}
        for (row, _), row_turns in zip(workers, turns, strict=True)
    ]
    for result in results:
        # turn by turn: what disturbs one, and the windows that it draws, are the same for all rows
        pairs = zip(results[0]["seconds"], result["seconds"], strict=True)
        result["speedups"] = [baseline / seconds for baseline, seconds in pairs]
        result["speedup"] = statistics.median(result["speedups"])
    return results


def _check(
    workers: Sequence[tuple[Row, Worker]], where: str, advance: Callable[[int, str], None]
) -> dict[str, dict[str, float]]:
    """Bring every worker to the end of iteration CHECKED − 1 and compare rows with the baseline.

    A literal baseline is compared with the rows that promise its weights, another one with all rows, which may differ.
    """
    records: list[list[dict[str, Any]]] = []
    compared = workers[0][0].tree or any(row.equal for row, _ in workers[1:])
    for row, worker in workers:
        advance(0, f"{where}: checking {row.name}")
        reports = [worker.ready()]
        # where nothing is compared the second iteration warms up what the first did not meet
        for _ in range(1, CHECKED if compared else 2):
            reports.append(worker.iterate())
            advance(1, "")
        records.append([report["record"] for report in reports])
    (baseline, first), *others = workers
    checked: dict[str, dict[str, float]] = {}
    # gigabytes of a large model are not written for nothing
    weights = first.weights() if compared else {}
    for (row, worker), row_records in zip(others, records[1:], strict=True):
        if row.equal and baseline.kind == "literal":
            checked[row.name] = compare(
                first.initial_weights(), weights, worker.weights(), records[0], row_records, f"{where}: {row.name!r}"
            )
        elif baseline.tree:
            checked[row.name] = {"largest_weight_difference": _largest_difference(worker.weights(), weights)}
    return checked


def compare(
    start: dict[str, torch.Tensor],
    literal: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    literal_records: Sequence[dict[str, Any]],
    records: Sequence[dict[str, Any]],
    what: str,
) -> dict[str, float]:
    """Measure how far a row is from the literal loop.

    Args:
        start: weights before training; literal, weights: after it; records: of their iterations; what: for the message.

    Raises:
        Different: by more than the tolerances.
    """
    pairs = list(zip(records, literal_records, strict=True))
    largest = _largest_difference(weights, literal)
    share = _distance(weights, literal) / _distance(literal, start)
    loss = max(abs(a["loss"] - b["loss"]) * len(a["window_starts"]) / a["window_steps"] for a, b in pairs)
    same = all(a["window_starts"] == b["window_starts"] for a, b in pairs)
    # written so that NaN fails too
    if not (same and largest <= WEIGHT_TOLERANCE and share <= MOVE_TOLERANCE and loss <= LOSS_TOLERANCE):
        raise Different(
            f"{what} is not the literal loop after {len(pairs)} iterations: weights differ by up to {largest:.2g} "
            f"(at most {WEIGHT_TOLERANCE:g}) and by {share:.2g} of their move (at most {MOVE_TOLERANCE:g}), losses by "
            f"{loss:.2g} per step (at most {LOSS_TOLERANCE:g}), windows are {'equal' if same else 'not equal'}; "
            "nothing was timed"
        )
    return {"largest_weight_difference": largest, "share_of_move": share, "loss_per_step": loss}


def _largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - value).abs().max()) for name, value in b.items())


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[name].double() - b[name].double()).square().sum()) for name in a) ** 0.5


def _turn(worker: Worker, iterations: int, clock: str, *, bare: bool) -> dict[str, Any]:
    """Sum over the iterations; `bare` times their bare UNet calls too, right after each."""
    reports, seconds, bare_seconds = [], 0.0, 0.0
    for _ in range(iterations):
        started = worker.processor_seconds() if clock == "cpu" else 0.0
        reports.append(worker.iterate())
        done = worker.processor_seconds() if clock == "cpu" else reports[-1]["seconds"]
        seconds += done - started
        if bare:
            wall = worker.bare()
            bare_seconds += worker.processor_seconds() - done if clock == "cpu" else wall
    total = {name: sum(report[name] for report in reports) for name in ("batches", "images", "images_with_gradient")}
    starts = [start for report in reports for start in report["record"]["window_starts"]]
    total |= {"seconds": seconds, "bare_seconds": bare_seconds, "starts": starts}
    return total | {"peak_bytes": reports[-1]["peak_bytes"]}


def _summary(row: Row, turns: Sequence[dict[str, Any]], images: int) -> dict[str, Any]:
    """Medians over turns, and means of what is counted."""
    seconds = [turn["seconds"] for turn in turns]
    overheads = [turn["seconds"] / turn["bare_seconds"] for turn in turns if turn["bare_seconds"]]
    return {
        "name": row.name,
        "options": row.options,
        "images_per_turn": images,
        "seconds": seconds,
        "seconds_median": statistics.median(seconds),
        "images_per_second": images / statistics.median(seconds),
        "overhead": statistics.median(overheads) if overheads else None,
        "mean_start": statistics.mean(start for turn in turns for start in turn["starts"]),
        "unet_batches": statistics.mean(turn["batches"] for turn in turns),
        "unet_images": statistics.mean(turn["images"] for turn in turns),
        "unet_images_with_gradient": statistics.mean(turn["images_with_gradient"] for turn in turns),
        "peak_bytes": max(turn["peak_bytes"] for turn in turns),
        "turns": [(turn["images"], turn["images_with_gradient"], turn["seconds"]) for turn in turns],
    }
