"""RunFolder: what a run writes, and which configuration may go on in it. Only the main rank touches the folder.

folder/
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
from pathlib import Path
from typing import Any

from filelock import BaseFileLock
from torch import Tensor

from hrf_fast.config.load import differences, load_config, to_yaml
from hrf_fast.config.options import FACTS, Config
from hrf_fast.evaluation.grids import save_grid
from hrf_fast.policies.base import Policy
from hrf_fast.run import lock
from hrf_fast.run.card import save_model
from hrf_fast.run.checkpoint import list_checkpoints, sweep
from hrf_fast.run.files import read_log, write_atomically


class RunFolder:
    """One training run's folder."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = Path(config.run.folder)
        self.checkpoints = self.path / "checkpoints"
        self._lock: BaseFileLock | None = None

    def claim(self) -> None:
        """Take the folder for this process and this configuration.

        Raises:
            ValueError: it holds another run or something else, or another process trains in it.
            OSError: it can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_claim()
            self._lock = lock.lock_folder(self.path)
        except OSError as error:
            raise OSError(
                f"run.folder is {str(self.path)!r}, which can't be written: {error}; choose another"
            ) from error

    def _check_claim(self) -> None:
        """Refuse a folder that holds another run, or something else.

        A run that has neither a checkpoint nor an iteration to lose may change its configuration.
        """
        path = self.path / "config.yaml"
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise ValueError(f"{self.checkpoints} is not a folder; remove it, or choose another run.folder")
        if path.exists():
            if not list_checkpoints(self.checkpoints) and not read_log(self.path / "metrics.jsonl"):
                return
            changes = differences(load_config(["--config", str(path)]), self.config)
            changes = {option: pair for option, pair in changes.items() if not self._may_change(option)}
            if changes:
                listed = "; ".join(f"{option} was {old!r} and is {new!r}" for option, (old, new) in changes.items())
                raise ValueError(
                    f"run.folder {self.path} holds a run of another configuration ({listed}); choose another "
                    "run.folder, restore those options to resume, or delete the folder"
                )
        elif any(path.name not in (lock.NAME, lock.OWNER) for path in self.path.iterdir()):
            raise ValueError(f"run.folder {self.path} is not empty and holds no run; choose another run.folder")

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.release()

    def begin(self, done: int) -> None:
        """Make the folder this configuration's, after `done` iterations; log lines of later iterations are dropped.

        Raises:
            ValueError: more iterations are done than asked for, or a finished run has lost its checkpoints.
        """
        if done > self.config.train.iterations:
            raise ValueError(
                f"train.iterations is {self.config.train.iterations} but {self.path} has done {done}; "
                "use at least that many, or another run.folder"
            )
        if done == 0 and (self.path / "model").exists():
            raise ValueError(
                f"run.folder {self.path} holds a tuned model but no checkpoint to go on from; choose another "
                "run.folder, or delete the folder to train again"
            )
        path = self.path / "config.yaml"
        if done == 0 and path.exists() and differences(load_config(["--config", str(path)]), self.config):
            # the panel of a configuration that never trained
            (self.path / "evaluations.jsonl").unlink(missing_ok=True)
        sweep(self.checkpoints)
        self.rewind(done)
        write_atomically(path, to_yaml(self.config).encode())

    def _may_change(self, option: str) -> bool:
        if option == "train.iterations":
            # a cosine learning rate depends on the length, so another length is another run
            return self.config.optimizer.learning_rate_schedule == "constant"
        return FACTS[option].resumable

    def rewind(self, iteration: int) -> None:
        """Drop log lines of iterations that a resumed run will do again."""
        for name, last in (("metrics.jsonl", iteration - 1), ("evaluations.jsonl", iteration)):
            path = self.path / name
            if path.exists():
                earlier = [record for record in read_log(path) if record["iteration"] <= last]
                write_atomically(path, "".join(json.dumps(record) + "\n" for record in earlier).encode())

    def panels(self) -> list[dict[str, Any]]:
        """The lines of evaluations.jsonl."""
        return read_log(self.path / "evaluations.jsonl")

    def append_panel(self, record: dict[str, Any], images: Tensor) -> None:
        """Write a panel's PNG grid and its line of evaluations.jsonl."""
        save_grid(images, self.path / "samples" / f"iteration-{record['iteration']:06d}.png")
        self.append("evaluations.jsonl", record)

    def save_model(self, policy: Policy) -> None:
        """Write the tuned model of the last panel as a diffusers folder with its card."""
        panels = self.panels()
        save_model(self.path / "model", policy, self.config, panels, panels[-1]["iteration"])

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a line to a log, whole or not at all."""
        # one write of a whole line to an append-only file: a crash can't tear it
        data = (json.dumps(record) + "\n").encode()
        with open(self.path / name, "ab", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
