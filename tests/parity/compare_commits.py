"""Compare the numbers of two commits: short runs of every method on one rank, on two and under ZeRO-2, line by line.

    python -m tests.parity.compare_commits BASE [HEAD] [--only CASE …]

HEAD is the checked-out commit by default. Both are put into git worktrees of their own, so what is not committed plays
no part. Every number of metrics.jsonl and evaluations.jsonl must be equal to the bit, but for times and memory. A line
per case says so or names the first key that differs; the exit code is 1 where one does. Takes some ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hrf_fast.config.renamed import RENAMED
from tests.runs import MEASURED

ROOT = Path(__file__).parents[2]
COMMON = {
    "model.name": "fashion",
    "sample.num_inference_steps": "8",
    "train.iterations": "3",
    "train.groups_per_iteration": "4",
    "train.groups_per_step": "2",
    "train.group_size": "3",
    "optimizer.learning_rate": "1e-4",
    "evaluation.every": "0",
    "evaluation.panel_size": "8",
    "run.save_every": "0",
    "run.device": "cpu",
    "run.progress": "quiet",
}
METHODS = {
    "ddpo": {"window.schedule": "full", "train.advantages": "batch"},
    "hrf": {"window.schedule": "clusters", "window.kwargs": "{iterations_per_cluster: 1}"},
    "hrf_d": {"window.schedule": "dynamic"},
}
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
LAUNCHES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "one": ((), {}),
    "two": (TWO_RANKS, {}),
    "zero2": (TWO_RANKS, {"engine.deepspeed": "configs/deepspeed/zero2.json"}),
}
"""Launcher and options by name."""
CASES = [f"{method}/{launch}" for method in METHODS for launch in LAUNCHES]


@contextmanager
def worktrees(commits: Sequence[str]) -> Iterator[list[Path]]:
    """A folder with each commit's files."""
    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder) / str(number) for number in range(len(commits))]
        try:
            for tree, commit in zip(trees, commits, strict=True):
                _git("worktree", "add", "--detach", str(tree), commit)
            yield trees
        finally:
            for tree in trees:
                if tree.exists():
                    _git("worktree", "remove", "--force", str(tree))


def _git(*words: str) -> None:
    result = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"git {' '.join(words)}: {result.stderr.strip()}")


def records(tree: Path, case: str) -> list[dict[str, Any]]:
    """The lines that a case's run in `tree` logs, less times and memory."""
    method, launch = case.split("/")
    launcher, extra = LAUNCHES[launch]
    options = COMMON | METHODS[method] | extra
    if not (tree / "hrf_fast" / "config" / "renamed.py").exists():
        old_names = {new: old for old, new in RENAMED.items()}
        options = {old_names.get(name, name): value for name, value in options.items()}
    environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        words = [f"{name}={value}" for name, value in (options | {"run.folder": f"{folder}/run"}).items()]
        command = [sys.executable, *launcher, "hrf_fast/train.py", *words]
        result = subprocess.run(
            command, cwd=tree, env=environment | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True
        )
        if result.returncode:
            raise SystemExit(f"{case} failed in {tree}:\n{result.stderr[-3000:]}")
        logs = [Path(folder) / "run" / name for name in ("metrics.jsonl", "evaluations.jsonl")]
        lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def first_difference(base: Sequence[dict[str, Any]], head: Sequence[dict[str, Any]]) -> str | None:
    """The first key whose values differ, in words; None where all are equal."""
    if len(base) != len(head):
        return f"{len(base)} lines and {len(head)}"
    for before, after in zip(base, head, strict=True):
        # a number that only the later commit logs is no difference
        for key in before:
            # compared as text: a NaN equals a NaN
            old, new = (json.dumps(line.get(key, "none")) for line in (before, after))
            if old != new:
                return f"{key} of iteration {after.get('iteration')} is {old} and {new}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("head", nargs="?", default="HEAD")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, metavar="CASE", help=", ".join(CASES))
    arguments = parser.parse_args(argv)
    different = 0
    with worktrees([arguments.base, arguments.head]) as trees:
        for number, case in enumerate(arguments.only, start=1):
            began = time.monotonic()
            difference = first_difference(*(records(tree, case) for tree in trees))
            different += difference is not None
            progress = f"{number} of {len(arguments.only)}, {time.monotonic() - began:.0f} s"
            print(f"{case}: {difference or 'equal'} ({progress})", flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
