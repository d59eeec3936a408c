"""Run: train what a study lacks, learning rates first where it tunes them.

A run's folder resumes itself, so a study that was stopped goes on with the same command.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from hrf_fast.errors import writing
from hrf_fast.run.interrupts import Interrupts
from hrf_fast.study.plan import Job, Study
from hrf_fast.study.results import Key, Results, code_commit, key
from hrf_fast.study.statistics import path_of
from hrf_fast.study.workers import Workers, say


def run_study(study: Study, *, out: Path, results: Results, jobs: int, also: Collection[str] = ()) -> None:
    """Train what has no whole line yet, learning rates first where the study tunes them.

    Args:
        out: folder of the run folders; jobs: runs side by side; also: commits whose lines count besides the code's own.

    Raises:
        ValueError: a configuration can't work, another process runs the study in `out`, or runs failed; the others
            have their lines.
        KeyboardInterrupt: a signal, after the runs have saved checkpoints.
    """
    if jobs < 1:
        raise ValueError(f"--jobs is {jobs}; use at least 1")
    study.check()
    out.mkdir(parents=True, exist_ok=True)
    # not found out after the first run
    with writing(results.path):
        results.path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock", timeout=0)
    try:
        # released at the end of the block below
        held = lock.acquire()
    except Timeout:
        raise ValueError(f"another process runs a study in {out}; wait for it, or use another --out") from None
    tuning = study.tuning_jobs()
    total = len(tuning) + len(study.cases) * len(study.arms) * len(study.seeds)
    with held, tqdm(total=total, unit=" run", dynamic_ncols=True, disable=None) as bar, Interrupts(say):
        workers = Workers(out, results, jobs, {code_commit(), *also}, bar)
        rates: dict[tuple[str, str], float] = {}
        if tuning:
            lines = workers.train(tuning)
            _check_counted(tuning, lines)
            for note in failures(tuning, lines):
                say(note)
            for choice in choices(study, lines):
                record = {**choice, "commit": code_commit()}
                if record not in results.read()[0]:
                    results.append(record)
                say(f"{choice['case']}, {choice['arm']}: learning rate {study.shown_rate(choice['learning_rate'])}")
                rates[choice["case"], choice["arm"]] = choice["learning_rate"]
        compared = study.jobs(rates)
        lines = workers.train(compared)
        _check_counted(compared, lines)
    failed = [f"{case}-{arm}-{seed}" for (case, arm, seed, _), line in lines.items() if "error" in line]
    untuned = [f"{case}-{arm}" for case in study.cases for arm in study.arms if tuning and (case, arm) not in rates]
    if failed or untuned:
        without = f"; no learning rate worked for {', '.join(untuned)}" if untuned else ""
        raise ValueError(
            f"{len(failed)} runs failed: {', '.join(failed) or 'none'}{without}. {results.path} has their errors, "
            f"{out} their logs; the same command tries them again"
        )


def _check_counted(jobs: Sequence[Job], lines: Mapping[Key, Any]) -> None:
    """Raise ValueError where runs have no line that counts, as after an edit of the code between two of them."""
    if uncounted := [job.name for job in jobs if key(job) not in lines]:
        raise ValueError(
            f"the code has changed while the study ran, and the lines of {', '.join(uncounted)} do not count beside "
            "the others; the same command trains what the code as it is now lacks"
        )


def failures(tuning: Sequence[Job], lines: Mapping[Key, dict[str, Any]]) -> list[str]:
    """A note for each tuning run of a case that has any which had no part in the choice of a learning rate."""
    begun = {case for case, *_ in lines}
    outcomes = ((job, lines.get(key(job), {"error": "not run yet"})) for job in tuning if job.case in begun)
    return [f"{job.name} was out of the choice: {line['error']}" for job, line in outcomes if "error" in line]


def choices(study: Study, lines: dict[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """The learning rate of each arm and case: the one of the highest gain among panels that keep the floor.

    A run's gain is that of its best panel whose diversity is at least `study.keep`, the pretrained one with gain 0
    among them; the mean over tuning seeds decides, and the smaller rate at a tie. A rate that failed on a seed is out.

    Args:
        lines: of the tuning runs, by `key`.
    """
    chosen = []
    for case in study.cases:
        for arm in study.arms:
            gains = {}
            for rate in sorted(study.learning_rates):
                own_lines = [lines.get((case, arm, seed, rate), {"error": ""}) for seed in study.tuning_seeds]
                if not any("error" in line for line in own_lines):
                    panels = [[p for p in path_of(line) if p.kept >= study.keep] for line in own_lines]
                    gains[rate] = statistics.fmean(max(p.gain for p in run) for run in panels)
            if gains:
                rate = max(gains, key=lambda rate: (gains[rate], -rate))
                table = {f"{rate:g}": round(value, 6) for rate, value in gains.items()}
                chosen.append({"case": case, "arm": arm, "learning_rate": rate, "choice": table})
    return chosen
