"""RunFolder: what a run writes, and which configuration may go on in it. Only the main rank touches the folder.

folder/
    config.yaml          the whole configuration, a valid --config
    metrics.jsonl        one line per iteration
    evaluations.jsonl    one line per panel
    events.jsonl         one line for each thing that a rule of `stop` has seen, and for the end
    pretrained.safetensors   where panels have a network: of the first, what later ones compare with
    samples/             the panel as PNG grids, iteration-000000.png is the pretrained model
    checkpoints/         newest few, for resume
    model/               the tuned model, a diffusers folder
    sources.json         file and SHA-256 of the user's reward and schedule, and of the base model, where they count
    .lock, .lock-owner   held while a process trains here, and by which
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from filelock import BaseFileLock
from safetensors.torch import save
from torch import Tensor

from hrf_fast.config.credentials import without_credentials
from hrf_fast.config.load import differences, to_yaml
from hrf_fast.config.options import FACTS, Config
from hrf_fast.config.paths import absolute, with_absolute_paths
from hrf_fast.errors import NotWritten
from hrf_fast.evaluation.grids import captions_of, save_grid
from hrf_fast.policies.base import Policy
from hrf_fast.run import lock
from hrf_fast.run.card import save_model
from hrf_fast.run.checkpoint import checkpoint_path, has_trained, sweep
from hrf_fast.run.files import append_line, is_leftover, read_log, remove_folder, write_atomically
from hrf_fast.run.layout import EVALUATIONS, EVENTS, METRICS, RunFiles
from hrf_fast.run.sources import BASE, SOURCES, check_base, edited_notes
from hrf_fast.weights import read_tensors

PRETRAINED = "pretrained.safetensors"
# memory of the W&B writer
WANDB_ID, WANDB_SENT = "wandb_id", "wandb_sent"


class RunFolder(RunFiles):
    """One training run's folder."""

    def __init__(self, config: Config) -> None:
        super().__init__(absolute(config.run.folder))
        self.config = config
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
        except NotWritten:
            raise
        except OSError as error:
            raise OSError(
                f"run.folder is {str(self.path)!r}, which can't be written: {error}; choose another"
            ) from error

    def _check_claim(self) -> None:
        """Refuse a folder that holds another run, or something else.

        A run that has neither a checkpoint nor an iteration to lose may change its configuration.
        """
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise ValueError(f"{self.checkpoints} is not a folder; remove it, or choose another run.folder")
        if self.config_file.exists() and self._is_run():
            if not has_trained(self.checkpoints) and not self.metrics():
                return
            changes = self._changes()
            changes = {option: pair for option, pair in changes.items() if not self._may_change(option)}
            if changes:
                shown = {option: without_credentials(list(pair)) for option, pair in changes.items()}
                listed = "; ".join(f"{option} was {old!r} and is {new!r}" for option, (old, new) in shown.items())
                raise ValueError(
                    f"run.folder {self.path} holds a run of another configuration ({listed}); choose another "
                    "run.folder, restore those options to resume, or delete the folder; docs/run_folder.md has the "
                    "command that goes on from its model under other options"
                )
        elif any(path.name not in (lock.NAME, lock.OWNER) and not is_leftover(path) for path in self.path.iterdir()):
            raise ValueError(f"run.folder {self.path} is not empty and holds no run; choose another run.folder")

    def _is_run(self) -> bool:
        """Whether the folder with a config.yaml is a run's; one that somebody has written holds nothing else of it."""
        ours = (lock.NAME, lock.OWNER, self.checkpoints.name, METRICS, PRETRAINED)
        return any((self.path / name).exists() for name in ours)

    def release(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            self._lock.release()

    def begin(self, done: int, sources: Mapping[str, dict[str, str]]) -> list[str]:
        """Make the folder this configuration's, after `done` iterations; log lines of later iterations are dropped.

        Args:
            sources: the user's code by name, as `source_of` gives it.

        Returns:
            A line for each of the user's sources that has changed since the run began, and one for iterations whose
            lines metrics.jsonl has lost.

        Raises:
            ValueError: more iterations are done than asked for, a finished run has lost its checkpoints, the weights
                that it began with have changed, or a source has and run.edited_code is refuse.
        """
        if done > self.config.train.iterations:
            raise ValueError(
                f"train.iterations is {self.config.train.iterations} but {self.path} has done {done}; "
                "use at least that many, or another run.folder"
            )
        # a run may end at the pretrained model, before its first iteration
        if done == 0 and self.model.exists() and not self._ended_at_start():
            raise ValueError(
                f"run.folder {self.path} holds a tuned model but no checkpoint to go on from; choose another "
                "run.folder, or delete the folder to train again"
            )
        if done == 0:
            # of such an end: until the next one there is no tuned model
            remove_folder(self.model)
        if done and BASE in sources:
            check_base(self.path, self.config.model.name, sources[BASE]["sha256"])
        changed = edited_notes(self.path, sources)
        if changed and done and self.config.run.edited_code == "refuse":
            raise ValueError(
                f"{changed[0]}, and run.edited_code is refuse; restore the file, choose another run.folder, or set "
                "run.edited_code=note"
            )
        if done == 0 and self.config_file.exists() and (changed or self._changes()):
            # the panel of a configuration that never trained, and the W&B run that shows it
            for name in (EVALUATIONS, EVENTS, PRETRAINED, WANDB_ID, WANDB_SENT):
                (self.path / name).unlink(missing_ok=True)
            # a checkpoint of its pretrained weights
            remove_folder(checkpoint_path(self.checkpoints, 0))
        sweep(self.checkpoints)
        self.rewind(done)
        write_atomically(self.config_file, to_yaml(self.config).encode())
        if done == 0 or not (self.path / SOURCES).exists():
            # what an older run began with is not known any more
            known = {name: source for name, source in sources.items() if done == 0 or name != BASE}
            if known:
                write_atomically(self.path / SOURCES, json.dumps(known, indent=1).encode())
        return [*changed, *self._gaps(done)] if done else []

    def _ended_at_start(self) -> bool:
        """Whether the tuned model is the pretrained one: a run that has no other checkpoint has nothing to lose."""
        return any(end["iteration"] == 0 or end.get("figures", {}).get("model") == 0 for end in self.ends()[-1:])

    def _gaps(self, done: int) -> list[str]:
        """A line where metrics.jsonl lacks iterations that a checkpoint has."""
        missing = sorted(set(range(done)) - {record["iteration"] for record in self.metrics()})
        if not missing:
            return []
        gap = f"{len(missing)} of the {done} iterations that are done, first {missing[0]}"
        return [f"{self.path / METRICS} lacks {gap}: the weights have them, but no report shows them"]

    def _changes(self) -> dict[str, tuple[Any, Any]]:
        """Options of the folder's config.yaml that the configuration has otherwise."""
        before = self.read_config()
        return differences(with_absolute_paths(before), with_absolute_paths(self.config))

    def _may_change(self, option: str) -> bool:
        if option == "train.iterations":
            # a cosine or a ramp depends on the length, so another length is another run
            constant = self.config.optimizer.learning_rate_schedule == "constant"
            return constant and self.config.remedies.kl_weight_end is None
        return FACTS[option].resumable

    def rewind(self, iteration: int) -> None:
        """Drop log lines of iterations that a resumed run will do again."""
        for name, last in ((METRICS, iteration - 1), (EVALUATIONS, iteration), (EVENTS, iteration)):
            path = self.path / name
            if path.exists():
                earlier = [record for record in read_log(path) if record["iteration"] <= last]
                write_atomically(path, "".join(json.dumps(record) + "\n" for record in earlier).encode())

    def lines(self) -> list[tuple[dict[str, Any], bool]]:
        """The lines of both logs in the order in which they were written, each with whether it is a panel's."""
        logged = [*((r, True) for r in self.panels()), *((r, False) for r in self.metrics())]
        return sorted(logged, key=lambda pair: (pair[0]["iteration"], not pair[1]))

    def save_pretrained(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what later panels are compared with: the halves of the pretrained panel's metrics (`evaluation.kept`),
        and its features where their precision is judged."""
        write_atomically(self.path / PRETRAINED, save({name: values.contiguous() for name, values in tensors.items()}))

    def pretrained(self) -> dict[str, Tensor]:
        """Read what `save_pretrained` has written; empty for a run that began without.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.path / PRETRAINED
        way_out = "restore it, or delete it to go on without shares of the pretrained model"
        return read_tensors(path, way_out) if path.is_file() else {}

    def append_panel(self, record: dict[str, Any], images: Tensor) -> None:
        """Write a panel's PNG grid and its line of evaluations.jsonl."""
        save_grid(images, self.grid(record["iteration"]), **captions_of(record))
        self.append(EVALUATIONS, record)

    def save_model(self, policy: Policy, iterations: int) -> None:
        """Write the tuned model, of so many iterations, as a diffusers folder with its card."""
        save_model(self.model, policy, self.config, self.panels(), iterations)

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a line to a log, whole or not at all."""
        append_line(self.path / name, json.dumps(record))
