"""Run: train what a study lacks, each run in a process of its own, several side by side, and keep its line.

A run's folder resumes itself, so a study that was stopped goes on with the same command.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from hrf_fast.run.files import PANEL, read_log, write_atomically
from hrf_fast.run.finished import model_iteration
from hrf_fast.run.interrupts import Interrupts
from hrf_fast.run.lock import lock_folder
from hrf_fast.study.plan import Job, Study
from hrf_fast.study.results import Key, Results, code_commit, facts, key, select
from hrf_fast.study.statistics import end_of, path_of

# how often finished processes are looked for, in seconds
_POLL = 0.2
# an error of the command, and the last line of a traceback
_ERROR = re.compile(r"^error: (.+)|^Traceback \(most recent call last\):\n(?: .*\n)+(\S.*)", re.MULTILINE)


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
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process runs a study in {out}; wait for it, or use another --out") from None
    tuning = study.tuning_jobs()
    total = len(tuning) + len(study.cases) * len(study.arms) * len(study.seeds)
    with lock, tqdm(total=total, unit=" run", dynamic_ncols=True, disable=None) as bar, Interrupts(_say):
        workers = Workers(out, results, jobs, {code_commit(), *also}, bar)
        rates: dict[tuple[str, str], float] = {}
        if tuning:
            lines = workers.train(tuning)
            _check_counted(tuning, lines)
            for note in failures(tuning, lines):
                _say(note)
            for choice in choices(study, lines):
                record = {**choice, "commit": code_commit()}
                if record not in results.read()[0]:
                    results.append(record)
                _say(f"{choice['case']}, {choice['arm']}: learning rate {study.shown_rate(choice['learning_rate'])}")
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


def _begun(path: Path) -> dict[str, Any]:
    """Code and configuration that a run folder was begun with, from the file beside it; commit "unknown" without one.

    Raises:
        ValueError: the file is no such record.
    """
    if not path.is_file():
        return {"commit": "unknown"}
    try:
        record = json.loads(path.read_text())
        return {"commit": record["commit"], "configuration": record["configuration"]}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} does not say what its run was begun with ({error}); delete it, and the run beside it is renamed "
            "and made again"
        ) from error


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


def reason_in(log: Sequence[str]) -> str | None:
    """Why a run has ended, from the lines of its log; a reward may have printed before that on its line."""
    reasons = [match[1] for line in log if (match := re.search(r"done, (.*): .* \(hrf report", line))]
    return reasons[-1] if reasons else None


class Workers:
    """Processes that train, a given number of them side by side."""

    def __init__(self, out: Path, results: Results, slots: int, commits: Collection[str], bar: tqdm) -> None:
        self.out, self.results, self.slots, self.commits, self.bar = out, results, slots, commits, bar
        # each with the facts of its line, as they are when it starts
        self._running: dict[subprocess.Popen[bytes], tuple[Job, dict[str, Any]]] = {}
        self._noted: set[str] = set()

    def train(self, jobs: Sequence[Job]) -> dict[Key, dict[str, Any]]:
        """Train the runs that have no whole line; returns the line of each."""
        lines = self._lines(jobs)
        pending = [job for job in jobs if "error" in lines.get(key(job), {"error": ""})]
        self.bar.update(len(jobs) - len(pending))
        try:
            while pending or self._running:
                while pending and len(self._running) < self.slots:
                    self._start(pending.pop(0))
                self.bar.set_description(", ".join(job.name for job, _ in self._running.values()), refresh=False)
                time.sleep(_POLL)
                for process in [process for process in self._running if process.poll() is not None]:
                    job, begun = self._running.pop(process)
                    outcome = self._outcome(job, process.returncode)
                    self.results.append({**facts(job, begun["commit"]), **begun, **outcome})
                    _say(f"{job.name}: {_summary(outcome)}")
                    self.bar.update()
        except BaseException:
            self._stop()
            raise
        return self._lines(jobs)

    def _lines(self, jobs: Sequence[Job]) -> dict[Key, dict[str, Any]]:
        records, notes = self.results.read()
        lines, more = select(records, jobs, self.commits)
        for note in {*notes, *more} - self._noted:
            _say(note)
            self._noted.add(note)
        return lines

    def _start(self, job: Job) -> None:
        """Start or resume a run; a folder of other code or of another configuration is renamed first."""
        folder, record = self.out / job.name, self.out / f"{job.name}.json"
        begun = {"commit": code_commit(), "configuration": job.configuration}
        before = _begun(record)
        if folder.exists() and before != begun:
            # whoever trains there still would go on in the new folder
            lock_folder(folder).release()
            aside = _free(self.out / f"{job.name}@{before['commit']}")
            folder.rename(aside)
            _say(f"{folder} is of other code or another configuration: it is {aside.name} now")
        write_atomically(record, json.dumps(begun).encode())
        config = self.out / f"{job.name}.yaml"
        write_atomically(config, job.to_yaml(folder).encode())
        threads = max(1, (os.cpu_count() or 1) // self.slots)
        with open(self.out / f"{job.name}.log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "hrf_fast.cli", "train", "--config", str(config)],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C reaches this process only, which then asks each run once: asked twice, a run saves nothing
                start_new_session=True,
            )
        self._running[process] = job, begun

    def _outcome(self, job: Job, code: int) -> dict[str, Any]:
        """Read what a finished process has left: reason, time and panels, or its error."""
        folder = self.out / job.name
        log = (self.out / f"{job.name}.log").read_text(errors="replace").strip().splitlines()
        if code:
            return {"error": _error(code, log, self.out / f"{job.name}.log")}
        reason = reason_in(log)
        if reason is None:
            return {"error": f"the run says nothing of its end; see {self.out / f'{job.name}.log'}"}
        panels = read_log(folder / "evaluations.jsonl", PANEL)
        model = model_iteration(folder)
        iterations = [sum(line["seconds"].values()) for line in read_log(folder / "metrics.jsonl")]
        for number, panel in enumerate(panels):
            # of training before it
            panel["seconds"] = round(sum(iterations[: panel["iteration"]]), 1)
            panel.pop("prompts", None)
            # for gains that are paired image by image
            if 0 < number < len(panels) - 1 and panel["iteration"] != model:
                del panel["rewards"]
        return {"seconds": round(sum(iterations), 1), "reason": reason, "model": model, "panels": panels}

    def _stop(self) -> None:
        """Ask every run to save a checkpoint and stop, and wait; a second signal does not let them save."""
        try:
            self._ask()
        except KeyboardInterrupt:
            self._ask()

    def _ask(self) -> None:
        for process in self._running:
            process.send_signal(signal.SIGINT)
        for process in self._running:
            process.wait()


def _error(code: int, log: Sequence[str], path: Path) -> str:
    """Say why a process failed: its signal, the last error that its log tells, or where to look."""
    if code < 0:
        name = next((each.name for each in signal.Signals if each == -code), f"signal {-code}")
        # what the system does where memory runs out
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    errors = [*_ERROR.finditer("\n".join(log))]
    return errors[-1][1] or errors[-1][2] if errors else f"exit code {code}; see {path}"


def _summary(outcome: dict[str, Any]) -> str:
    """A finished run in a line."""
    if "error" in outcome:
        return f"failed: {outcome['error']}"
    end = path_of(outcome)[end_of(outcome)]
    return f"{outcome['reason']}; gain {end.gain:+.4g}, {end.kept:.1%} kept, {outcome['seconds']:.0f} s"


def _say(text: str) -> None:
    """A line above the bar."""
    tqdm.write(text, file=sys.stderr)


def _free(path: Path) -> Path:
    """The path, or the first with a number behind it that does not exist."""
    number, free = 1, path
    while free.exists():
        number, free = number + 1, path.with_name(f"{path.name}-{number}")
    return free
