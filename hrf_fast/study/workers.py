"""Workers: the runs of a study, each in a process of its own, several side by side, and the line of each."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hrf_fast.config.credentials import without_credentials
from hrf_fast.cpu import usable_cpus
from hrf_fast.run.files import write_atomically
from hrf_fast.run.finished import finished_run
from hrf_fast.run.layout import RunFiles
from hrf_fast.run.lock import blending, lock_folder
from hrf_fast.study.outcome import blended, trained
from hrf_fast.study.plan import Job
from hrf_fast.study.results import Key, Results, check_panels, code_commit, facts, key, select
from hrf_fast.study.statistics import path_of, reported

# how often finished processes are looked for, in seconds
_POLL = 0.2
# an error of the command, and the last line of a traceback
_ERROR = re.compile(r"^error: (.+)|^Traceback \(most recent call last\):\n(?: .*\n)+(\S.*)", re.MULTILINE)


class Workers:
    """Processes that train or blend, a given number of them side by side."""

    def __init__(self, out: Path, results: Results, slots: int, commits: Collection[str], bar: tqdm) -> None:
        self.out, self.results, self.slots, self.commits, self.bar = out, results, slots, commits, bar
        # each with the facts of its line, as they are when it starts
        self._running: dict[subprocess.Popen[bytes], tuple[Job, dict[str, Any]]] = {}
        self._noted: set[str] = set()

    def train(self, jobs: Sequence[Job]) -> dict[Key, dict[str, Any]]:
        """Do the runs that have no whole line, blends after the runs that they are of; returns the line of each."""
        lines = self._lines(jobs)
        pending = [job for job in jobs if "error" in lines.get(key(job), {"error": ""})]
        self.bar.update(len(jobs) - len(pending))
        runs = {job.name: job for job in pending if job.blend is None}
        try:
            self._work(list(runs.values()))
            blends = [job for job in pending if job.blend]
            # at a blend's rate its arm may have no run, or one whose folder is gone; what failed is not tried twice
            lacking = {run.name: run for run in (job.training for job in blends) if not self._is_finished(run)}
            lacking = {name: run for name, run in lacking.items() if name not in runs}
            self.bar.total += len(lacking)
            self._work(list(lacking.values()))
            ready = [job for job in blends if self._is_finished(job.training)]
            for job in blends:
                if job not in ready:
                    self._fail(job)
            self._work(ready)
        except BaseException:
            self._stop()
            raise
        return self._lines(jobs)

    def _work(self, pending: list[Job]) -> None:
        """Do runs, `slots` of them side by side."""
        while pending or self._running:
            while pending and len(self._running) < self.slots:
                self._start(pending.pop(0))
            self.bar.set_description(", ".join(job.name for job, _ in self._running.values()), refresh=False)
            time.sleep(_POLL)
            for process in [process for process in self._running if process.poll() is not None]:
                job, begun = self._running.pop(process)
                outcome = self._outcome(job, process.returncode)
                self.results.append({**facts(job, begun["commit"]), **begun, **outcome})
                say(f"{job.name}: {_summary(outcome)}")
                self.bar.update()

    def _fail(self, job: Job) -> None:
        """Leave the line of blends whose run has failed."""
        run = job.training.name
        error = f"its run, {run}, has failed; see {self.out / f'{run}.log'}"
        self.results.append({**facts(job, code_commit()), "error": error})
        say(f"{job.name}: failed: {error}")
        self.bar.update()

    def _is_finished(self, run: Job) -> bool:
        """Whether the run has a folder with a tuned model, of code and options whose lines count."""
        begun = _begun(self.out / f"{run.name}.json")
        if begun["commit"] not in self.commits or begun.get("configuration") != run.configuration:
            return False
        try:
            finished_run(self.out / run.name)
        except ValueError:
            return False
        return True

    def _lines(self, jobs: Sequence[Job]) -> dict[Key, dict[str, Any]]:
        records, notes = self.results.read()
        lines, more = select(records, jobs, self.commits)
        for note in {*notes, *more} - self._noted:
            say(note)
            self._noted.add(note)
        return lines

    def _start(self, job: Job) -> None:
        """Start or resume a run, or the blends of one."""
        begun = {"commit": code_commit(), "configuration": job.configuration}
        if job.blend is None:
            self._make_way(job, begun)
            config = self.out / f"{job.name}.yaml"
            write_atomically(config, job.to_yaml(self.out / job.name).encode())
            words = ["train", "--config", str(config)]
        else:
            run, most, step = self.out / job.training.name, job.blend.most, job.blend.step
            if (blend := RunFiles(run).blend).exists():
                # of a study that was killed, a process may go on there
                with blending(blend):
                    pass
            begun["run_commit"] = _begun(self.out / f"{job.training.name}.json")["commit"]
            words = ["blend", str(run), "--keep", str(job.blend.keep), "--most", str(most), "--step", str(step)]
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cpus() // self.slots))
        with open(self.out / f"{job.name}.log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "hrf_fast.cli", *words],
                env={**os.environ, "OMP_NUM_THREADS": threads},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C reaches this process only, which then asks each run once: asked twice, a run saves nothing
                start_new_session=True,
            )
        self._running[process] = job, begun

    def _make_way(self, job: Job, begun: dict[str, Any]) -> None:
        """Say beside a run's folder what it is begun with; one of other code or of other options is renamed first."""
        folder, record = self.out / job.name, self.out / f"{job.name}.json"
        before = _begun(record)
        if folder.exists():
            # of a study that was killed, a process may train there still
            lock_folder(folder).release()
            if before != begun:
                aside = _free(self.out / f"{job.name}@{before['commit']}")
                folder.rename(aside)
                say(f"{folder} is of other code or another configuration: it is {aside.name} now")
        write_atomically(record, json.dumps(begun).encode())

    def _outcome(self, job: Job, code: int) -> dict[str, Any]:
        """Read what a finished process has left, or its error."""
        path = self.out / f"{job.name}.log"
        if code:
            return {"error": without_credentials(_error(code, path))}
        try:
            if job.blend is None:
                outcome = trained(self.out / job.name)
            else:
                outcome = blended(self.out / job.training.name, job.blend)
            check_panels(outcome)
        except (ValueError, TypeError, LookupError) as error:
            return {"error": without_credentials(f"{type(error).__name__}: {error}; see {path}")}
        return outcome

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


def _error(code: int, path: Path) -> str:
    """Say why a process failed: its signal, the last error that its log tells, or where to look."""
    if code < 0:
        name = next((each.name for each in signal.Signals if each == -code), f"signal {-code}")
        # what the system does where memory runs out
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    log = path.read_text(errors="replace").strip().splitlines()
    errors = [*_ERROR.finditer("\n".join(log))]
    return errors[-1][1] or errors[-1][2] if errors else f"exit code {code}; see {path}"


def _summary(outcome: dict[str, Any]) -> str:
    """A finished run in a line."""
    if "error" in outcome:
        return f"failed: {outcome['error']}"
    end = path_of({"panels": reported(outcome)})[-1]
    return f"{outcome['reason']}; gain {end.gain:+.4g}, {end.kept:.1%} kept, {outcome['seconds']:.0f} s"


def say(text: str) -> None:
    """A line above the bar."""
    tqdm.write(text, file=sys.stderr)


def _free(path: Path) -> Path:
    """The path, or the first with a number behind it that does not exist."""
    number, free = 1, path
    while free.exists():
        number, free = number + 1, path.with_name(f"{path.name}-{number}")
    return free


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
