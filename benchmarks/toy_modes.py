"""Modes kept by every method and remedy, on two mixtures of Gaussians where a collapse can be counted.

    python benchmarks/toy_modes.py --seeds 20 --out benchmarks/results
    python benchmarks/toy_modes.py --report --out benchmarks/results

An MLP is pretrained on each mixture, then tuned by the trainer's own loop with the arms of benchmarks/toys/arms.py, all
to one budget of network evaluations. Each arm's learning rate is chosen on the toy `equal` and seeds that are not
compared: the one of the highest mean gain with 90 % of the effective number of good modes kept, linear between panels.
Writes a line to toy_modes.jsonl as each run ends, and goes on from there; then toy_modes.md and toy_modes.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

if __name__ == "__main__":
    # instead of this folder, whose modules would hide packages of their names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.machine import machine
from benchmarks.toys.arms import ARMS, COMMON, LEARNING_RATES
from benchmarks.toys.experiment import arm_config, run
from benchmarks.toys.mixtures import TOYS
from benchmarks.toys.policy import pretrain
from benchmarks.toys.results import Line, chosen_rates, write_report
from hrf_fast.run.files import append_line

TUNING_SEEDS = (1000,)
TUNED_ON = "equal"


def read_lines(path: Path) -> list[Line]:
    """The lines of finished runs, the last one of each; half-written ones and those of other options are left out."""
    lines = {}
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        # lines of before have no options
        if line.get("options", _options(line["arm"])) == _options(line["arm"]):
            lines[_key(line)] = line
    return list(lines.values())


def compare(out: Path, *, seeds: int, arms: Sequence[str], toys: Sequence[str]) -> None:
    """Run what toy_modes.jsonl lacks: tuning first, then every arm on every toy, seed after seed."""
    path = out / "toy_modes.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    facts = machine(torch.device("cpu"), torch.get_num_threads())
    where = {name: facts[name] for name in ("cpu", "commit")}
    lines = read_lines(path)
    done = {_key(line) for line in lines}
    mlps = {name: pretrain(TOYS[name]) for name in toys}
    configs = {arm: arm_config(arm) for arm in arms}

    def add(jobs: Iterator[dict[str, Any]], count: int, title: str) -> None:
        for job in tqdm(jobs, total=count, desc=title, unit="run"):
            if _key(job) not in done:
                toy, arm = job["toy"], job["arm"]
                began = time.monotonic()
                panels = run(TOYS[toy], mlps[toy], configs[arm], seed=job["seed"], learning_rate=job["learning_rate"])
                took = {"options": _options(arm), "seconds": round(time.monotonic() - began, 1)}
                lines.append({**job, **where, **took, "good": TOYS[toy].good.tolist(), "panels": panels})
                append_line(path, json.dumps(lines[-1]))

    tuning = (
        {"toy": TUNED_ON, "arm": arm, "seed": seed, "learning_rate": rate, "tuning": True}
        for arm in arms
        for seed in TUNING_SEEDS
        for rate in LEARNING_RATES
    )
    add(tuning, len(arms) * len(TUNING_SEEDS) * len(LEARNING_RATES), "learning rates")
    rates = chosen_rates(lines)
    compared = (
        {"toy": toy, "arm": arm, "seed": seed, "learning_rate": rates[arm], "tuning": False}
        for seed in range(seeds)
        for toy in toys
        for arm in arms
    )
    add(compared, seeds * len(toys) * len(arms), "runs")


def _options(arm: str) -> str:
    """A digest of what an arm is, so that a run of other options counts for nothing."""
    return hashlib.sha256(json.dumps([COMMON, ARMS.get(arm)]).encode()).hexdigest()[:8]


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["toy"], line["arm"], line["seed"], line["learning_rate"], line["tuning"]


def main(words: Sequence[str] | None = None) -> None:
    """Run the comparison and write its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="seeds 0, 1, … of each arm on each toy, at least 2")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--toys", nargs="+", default=list(TOYS), choices=list(TOYS))
    parser.add_argument("--out", type=Path, default=Path("runs/toy_modes"), help="folder of toy_modes.*")
    parser.add_argument("--report", action="store_true", help="run nothing; report the lines that are there")
    arguments = parser.parse_args(words)
    if arguments.seeds < 2:
        parser.error(f"--seeds is {arguments.seeds}; an interval takes at least 2")
    torch.set_num_threads(1)
    if not arguments.report:
        compare(arguments.out, seeds=arguments.seeds, arms=arguments.arms, toys=arguments.toys)
    print(write_report(read_lines(arguments.out / "toy_modes.jsonl"), arguments.out))


if __name__ == "__main__":
    main()
