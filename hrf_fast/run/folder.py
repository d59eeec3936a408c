"""Run: the folder, its logs and progress, and when to evaluate and save. Only the main rank touches the folder.

run_dir/
    config.yaml          the whole configuration, a valid --config
    metrics.jsonl        one line per iteration
    evaluations.jsonl    one line per panel
    samples/             the panel as PNG grids, iteration-000000.png is the pretrained model
    checkpoints/         newest few, for resume
    model/               the tuned model, a diffusers folder
    .lock, .lock-owner   held while a process trains here, and by which
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock
from torch import Tensor

from hrf_fast.config.load import differences, load_config, to_yaml
from hrf_fast.config.options import Config
from hrf_fast.distributed import comm
from hrf_fast.engines.base import Engine
from hrf_fast.evaluation.grids import save_grid
from hrf_fast.evaluation.panel import PanelScores
from hrf_fast.policies.pixel import Policy
from hrf_fast.run import lock
from hrf_fast.run.checkpoint import list_checkpoints, save_checkpoint, sweep
from hrf_fast.run.files import read_log, replace_folder, write_atomically
from hrf_fast.run.interrupts import Interrupts
from hrf_fast.run.progress import Progress, Silence, build_progress
from hrf_fast.run.writers import Writer, build_writers

# options that may change between a run and its resume without changing what it computes
_FREE = (
    "run.progress",
    "run.writers",
    "run.save_every",
    "run.keep_checkpoints",
    "run.keep_best",
    "run.folder",
    "train.max_evaluations",
    "train.activations",
    "train.memory_budget",
    "reward.background",
    "train.self_check",
    "train.on_nan",
    "engine.deepspeed",
)


class Run:
    """One training run's folder; use as a context manager, on all ranks alike."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.run.folder)
        self.checkpoints = self.folder / "checkpoints"
        # the main rank's, for all
        self._lock: BaseFileLock | None = None
        comm.main_says(self._claim)
        self.progress: Progress = build_progress(config.run.progress) if comm.is_main() else Silence()
        self.interrupts = Interrupts(self.progress.note)
        self.writers: list[Writer] = []
        self.seconds: dict[str, float] = {}
        self._began = 0.0
        # iterations in the newest checkpoint
        self.saved = 0
        # what a checkpoint would hold beside the weights; None while these stand for no iteration
        self.state: dict[str, Any] | None = None
        self._unbroken = False
        self._spread_noted = False

    def _claim(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_claim()
            self._lock = lock.lock_folder(self.folder)
        except OSError as error:
            raise OSError(
                f"run.folder is {str(self.folder)!r}, which can't be written: {error}; choose another"
            ) from error

    def _check_claim(self) -> None:
        """Refuse a folder that holds another run, or something else.

        A run that has neither a checkpoint nor an iteration to lose may change its configuration.
        """
        path = self.folder / "config.yaml"
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise ValueError(f"{self.checkpoints} is not a folder; remove it, or choose another run.folder")
        if path.exists():
            if not list_checkpoints(self.checkpoints) and not read_log(self.folder / "metrics.jsonl"):
                return
            changes = differences(load_config(["--config", str(path)]), self.config)
            changes = {option: pair for option, pair in changes.items() if not self._may_change(option)}
            if changes:
                listed = "; ".join(f"{option} was {old!r} and is {new!r}" for option, (old, new) in changes.items())
                raise ValueError(
                    f"run.folder {self.folder} holds a run of another configuration ({listed}); choose another "
                    "run.folder, restore those options to resume, or delete the folder"
                )
        elif any(path.name not in (lock.NAME, lock.OWNER) for path in self.folder.iterdir()):
            raise ValueError(f"run.folder {self.folder} is not empty and holds no run; choose another run.folder")

    def begin(self, done: int) -> None:
        """Start, or go on after `done` iterations: from here on the folder is this configuration's.

        Log lines of iterations that will be done again are dropped.

        Raises:
            ValueError: more iterations are done than asked for, or a finished run has lost its checkpoints.
        """
        self.saved = done
        comm.main_says(lambda: self._begin(done))

    def _begin(self, done: int) -> None:
        if done > self.config.train.iterations:
            raise ValueError(
                f"train.iterations is {self.config.train.iterations} but {self.folder} has done {done}; "
                "use at least that many, or another run.folder"
            )
        if done == 0 and (self.folder / "model").exists():
            raise ValueError(
                f"run.folder {self.folder} holds a tuned model but no checkpoint to go on from; choose another "
                "run.folder, or delete the folder to train again"
            )
        path = self.folder / "config.yaml"
        if done == 0 and path.exists() and differences(load_config(["--config", str(path)]), self.config):
            # the panel of a configuration that never trained
            (self.folder / "evaluations.jsonl").unlink(missing_ok=True)
        sweep(self.checkpoints)
        self.rewind(done)
        write_atomically(path, to_yaml(self.config).encode())
        self.writers = build_writers(self.config.run.writers, self.folder, done)

    def _may_change(self, option: str) -> bool:
        if option == "train.iterations":
            # a cosine learning rate depends on the length, so another length is another run
            return self.config.train.learning_rate_schedule == "constant"
        return option in _FREE

    def __enter__(self) -> Run:
        self.interrupts.__enter__()
        return self

    def unbroken(self) -> None:
        """From here to `commit` the weights stand for no iteration: Ctrl-C waits, and nothing is saved."""
        if not self._unbroken:
            self._unbroken, self.state = True, None
            self.interrupts.hold()

    def commit(self, state: dict[str, Any]) -> None:
        """The weights stand for `state`, JSON-able and with `iteration`; a Ctrl-C that has waited stops the run."""
        self.state = state
        if self._unbroken:
            self._unbroken = False
            self.interrupts.release()
            self.interrupts.stop_if_asked()

    def save(self, policy: Policy, engine: Engine) -> None:
        """A checkpoint of the committed state, unless there is none to save or it is saved already."""
        if self.state is None or self.state["iteration"] in (0, self.saved):
            return
        run = self.config.run
        with self.interrupts.held():
            best = self.best() if run.keep_best else None
            save_checkpoint(self.checkpoints, policy, engine, self.state, keep=run.keep_checkpoints, best=best)
            self.saved = self.state["iteration"]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._unbroken:
            self._unbroken = False
            self.interrupts.release()
        self.interrupts.__exit__(kind)
        self.progress.close()
        for writer in self.writers:
            writer.close()
        if self._lock is not None:
            self._lock.release()

    def begin_iteration(self) -> None:
        """From here on time belongs to the next line of the log: panels and checkpoints do not."""
        self.seconds, self._began = {}, time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's time to the iteration's `seconds` and show its name."""
        self.interrupts.stop_if_asked()
        self.progress.phase(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def check_spread(self, iteration: int, advantages: Iterable[Tensor | None]) -> None:
        """Say once that a reward gives every sample of its group the same value, so that nothing can be learnt."""
        if not self._spread_noted and not any(group is not None and bool(group.any()) for group in advantages):
            self._spread_noted = True
            name = self.config.reward.name or " + ".join(term.name for term in self.config.reward.terms)
            self.progress.note(
                f"iteration {iteration}: reward.name {name} is the same for all samples of every group, so their "
                "advantages are 0 and nothing is learnt; use a reward that varies, or a larger train.group_size"
            )

    def rewind(self, iteration: int) -> None:
        """Drop log lines of iterations that a resumed run will do again."""
        for name, last in (("metrics.jsonl", iteration - 1), ("evaluations.jsonl", iteration)):
            path = self.folder / name
            if path.exists():
                kept = [record for record in read_log(path) if record["iteration"] <= last]
                write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def has_panel(self, iteration: int) -> bool:
        """Whether the panel after `iteration` iterations has been scored and logged."""
        return any(record["iteration"] == iteration for record in self._panels())

    def best(self) -> int | None:
        """After how many iterations the panel's reward was highest; None before the first that is not the start's."""
        tuned = [record for record in self._panels() if record["iteration"] > 0]
        return max(tuned, key=lambda record: record["reward"][0])["iteration"] if tuned else None

    def _panels(self) -> list[dict[str, Any]]:
        return comm.main_says(lambda: read_log(self.folder / "evaluations.jsonl"))

    def log(self, iteration: int, record: dict[str, Any], *, unet_seconds: float) -> None:
        """One metrics line for a finished iteration, also to the writers and the progress display.

        `overhead` is its time over that of its UNet calls, forwards and backwards.
        """
        whole = time.perf_counter() - self._began
        train = self.config.train
        times = {
            "seconds": self.seconds | {"other": whole - sum(self.seconds.values())},
            "speed": {
                "images_per_second": train.groups_per_iteration * train.group_size / whole,
                "unet_seconds": unet_seconds,
                "overhead": whole / unet_seconds,
            },
        }
        rounded = {name: {k: round(v, 4) for k, v in values.items()} for name, values in times.items()}
        line = {"iteration": iteration, **record, **rounded}
        comm.main_says(lambda: self._log(iteration, record, line))

    def _log(self, iteration: int, record: dict[str, Any], line: dict[str, Any]) -> None:
        self._append("metrics.jsonl", line)
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float))}
        timed = {f"{name}/{k}": v for name in ("seconds", "speed") for k, v in line[name].items()}
        for writer in self.writers:
            writer.scalars(iteration, numbers | timed)
        self.progress.iteration(iteration, line)

    def log_panel(self, iteration: int, scores: PanelScores, record: dict[str, Any]) -> None:
        """One evaluation line and the panel's PNG grid."""
        comm.main_says(lambda: self._log_panel(iteration, scores, record))

    def _log_panel(self, iteration: int, scores: PanelScores, record: dict[str, Any]) -> None:
        grid = scores.images[: self.config.evaluation.grid_size]
        save_grid(grid, self.folder / "samples" / f"iteration-{iteration:06d}.png")
        line = {"iteration": iteration, **record, **scores.record()}
        self._append("evaluations.jsonl", line)
        values = {f"panel/{k}": v[0] for k, v in scores.record().items() if k != "rewards"}
        for writer in self.writers:
            writer.scalars(iteration, values)
            writer.images(iteration, "panel", grid)
        self.progress.panel(iteration, line)

    def save_model(self, policy: Policy) -> Path:
        """Write the tuned model as a diffusers folder."""
        comm.main_says(lambda: replace_folder(self.folder / "model", policy.save))
        return self.folder / "model"

    def _append(self, name: str, record: dict[str, Any]) -> None:
        # one write of a whole line to an append-only file: a crash can't tear it
        data = (json.dumps(record) + "\n").encode()
        with open(self.folder / name, "ab", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
