"""The check that anyone with a GPU runs: what is proven here without one, and the card's figures.

    hrf bench gpu                           # in at most ten minutes; the same command goes on where it stopped
    hrf bench gpu --parts 'tests: *'        # only what proves
    hrf bench gpu --write README.md         # put the table of figures between the markers of a file
    hrf bench gpu --dry-run                 # without a GPU: every part as far as a CPU can, with tiny sizes

Offline: models are published layouts with random weights. First tests/gpu, then the kernel benchmark, then the training
benchmark against the loop as published. Each part's result is written as it ends, to OUT/gpu.json and OUT/gpu.md; a
part that is whole for the same code, card and driver does not run again. Exit code 0: all parts that ran are whole; 1:
a part failed; 2: there is no GPU, or time was up before the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench.page import MARKERS, missing, page, table
from benchmarks.gpu_bench.parts import PROOFS, Part, all_parts, kill_tests
from benchmarks.gpu_bench.record import FAILED, WHOLE, Record, facts_of
from benchmarks.tables import find_between, write_between


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options and check them.

    Raises:
        ValueError: names the option, its value and the rule.
    """
    parser = argparse.ArgumentParser(
        prog="hrf bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny sizes")
    parser.add_argument("--parts", nargs="+", default=["*"], help="only parts of these names; * is any text")
    parser.add_argument("--minutes", type=float, help="stop after this many; by default 10, and a dry run never")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of this file")
    options = parser.parse_args(words)
    if options.minutes is None:
        options.minutes = float("inf") if options.dry_run else 10.0
    elif not 0 < options.minutes < float("inf"):
        raise ValueError(f"--minutes is {options.minutes}; use a finite number above 0")
    if options.dry_run and options.write:
        raise ValueError(f"--write is {options.write}, but a dry run measures nothing to write; leave one of them out")
    if options.write:
        # before anything runs, for ten minutes
        find_between(options.write, MARKERS)
    return options


def choose(parts: dict[str, Part], patterns: Sequence[str]) -> dict[str, Part]:
    """The parts whose names match.

    Raises:
        ValueError: none does; says what there is.
    """
    chosen = {name: part for name, part in parts.items() if any(fnmatch(name, pattern) for pattern in patterns)}
    if not chosen:
        raise ValueError(f"--parts {' '.join(map(repr, patterns))} names no part; there are {'; '.join(parts)}")
    return chosen


def run(parts: dict[str, Part], record: Record, minutes: float, *, together: int = 1) -> None:
    """Run what is not whole yet, as long as there is time, and keep each result as it ends.

    Args:
        together: how many parts that time nothing run at once, each in a process of its own; they come first.
    """
    end = time.monotonic() + 60 * minutes
    for name in parts:
        if record.is_whole(name):
            _say(f"{name}: whole already")
    due = {name: part for name, part in parts.items() if not record.is_whole(name)}
    proofs = {name: part for name, part in due.items() if name.startswith(PROOFS)}
    with ThreadPoolExecutor(together) as pool:
        running = {pool.submit(_run, name, part, end): name for name, part in proofs.items()}
        try:
            for future in as_completed(running):
                _keep(record, running[future], future.result())
        except BaseException:
            # Ctrl-C: neither wait for what runs nor begin what does not
            pool.shutdown(wait=False, cancel_futures=True)
            kill_tests()
            raise
    for name, part in due.items():
        if name not in proofs:
            _keep(record, name, _run(name, part, end))


def _run(name: str, part: Part, end: float) -> dict[str, Any] | None:
    """A part's result with its seconds; None where time was up before it."""
    began = time.monotonic()
    if began >= end:
        return None
    _say(f"{name} …")
    try:
        result = part(end - began)
    # an out-of-memory error, or whatever a driver raises: the other parts still say something
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        # the end of a worker's traceback says what failed
        result = {"state": FAILED, "reason": f"{type(error).__name__}: {str(error)[-1500:]}"}
    return {**result, "part_seconds": round(time.monotonic() - began, 1)}


def _keep(record: Record, name: str, result: dict[str, Any] | None) -> None:
    if result:
        record.add(name, result)
        _say(f"{name}: {result['state']} in {result['part_seconds']:.0f} s")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Check and measure.

    Raises:
        ValueError: an option, or a part that failed; SystemExit with 2: no GPU, or not all parts in time.
    """
    options = parse(words)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda and not options.dry_run else torch.device("cpu")
    parts = choose(all_parts(device, dry_run=options.dry_run), options.parts)
    if not cuda and not options.dry_run:
        _say(f"no GPU: torch {torch.__version__} sees none, so nothing was checked; skipped: {'; '.join(parts)}")
        _say("see `hrf doctor`; --dry-run runs each part as far as a CPU can")
        raise SystemExit(2)
    record = Record(options.out / "gpu.json", facts_of(device, dry_run=options.dry_run))
    for line in missing(record.facts):
        _say(line)
    # a file of tests takes a core or two; all of them at once from 12 on
    run(parts, record, options.minutes, together=max(1, (os.cpu_count() or 1) // 2))
    everything = list(all_parts(device, dry_run=options.dry_run))
    (options.out / "gpu.md").write_text(page(record.facts, record.parts, everything))
    _say(f"written to {options.out / 'gpu.json'} and {options.out / 'gpu.md'}")
    failed = [name for name in parts if record.parts.get(name, {}).get("state") == FAILED]
    if failed:
        raise ValueError(f"{len(failed)} parts failed: {'; '.join(failed)}; {options.out / 'gpu.md'} says how")
    if late := [name for name in parts if record.parts.get(name, {}).get("state") != WHOLE]:
        _say(f"time was up before the end of {'; '.join(late)}: the same command goes on with them")
        raise SystemExit(2)
    if options.write:
        write_between(options.write, MARKERS, table(record.facts, record.parts))
