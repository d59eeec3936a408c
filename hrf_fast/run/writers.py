"""Writers: send a run's numbers to TensorBoard or Weights & Biases.

Both are optional packages and take no credential from a config: W&B uses what `wandb login` stored.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hrf_fast.errors import writing
from hrf_fast.evaluation.grids import image_grid
from hrf_fast.run.files import write_atomically
from hrf_fast.run.listeners import Listener

if TYPE_CHECKING:
    from PIL.Image import Image


class Writer(Listener):
    """Sends an iteration's numbers and a panel's numbers and images to a service; a subclass says how."""

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def image(self, iteration: int, name: str, picture: Image) -> None:
        raise NotImplementedError

    def iteration(self, record: dict[str, Any]) -> None:
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        timed = {f"{name}/{k}": v for name in ("seconds", "speed") for k, v in record[name].items()}
        numbers.pop("iteration")
        self.scalars(record["iteration"], numbers | timed)

    def panel(self, record: dict[str, Any], images: Tensor) -> None:
        intervals = {name: value for name, value in record.items() if isinstance(value, list) and name != "rewards"}
        self.scalars(record["iteration"], {f"panel/{name}": interval[0] for name, interval in intervals.items()})
        self.image(record["iteration"], "panel", image_grid(images))


class TensorBoardWriter(Writer):
    """Event files in run_dir/tensorboard."""

    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('run.writers has tensorboard: `pip install "hrf_fast[writers]"`') from error
        self._folder = folder / "tensorboard"
        with writing(self._folder):
            self._writer = SummaryWriter(str(self._folder), purge_step=done or None)

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        with writing(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, iteration)

    def image(self, iteration: int, name: str, picture: Image) -> None:
        with writing(self._folder):
            self._writer.add_image(name, np.asarray(picture), iteration, dataformats="HWC")

    def finished(self, reason: str) -> None:
        with writing(self._folder):
            self._writer.close()


class WandbWriter(Writer):
    """A W&B run named after the folder, gone on with after a resume.

    Log in once with `wandb login`, or set WANDB_MODE=offline.
    """

    def __init__(self, folder: Path, done: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError('run.writers has wandb: `pip install "hrf_fast[writers]"`, then `wandb login`') from error
        self._wandb = wandb
        known = folder / "wandb_id"
        if not known.exists():
            write_atomically(known, uuid.uuid4().hex.encode())
        identity = known.read_text()
        try:
            self._run = wandb.init(project="hrf_fast", name=folder.name, dir=str(folder), id=identity, resume="allow")
        except Exception as error:
            raise ValueError(
                f"run.writers has wandb, which did not start ({error}); run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        self._run.log({"iteration": iteration, **values})

    def image(self, iteration: int, name: str, picture: Image) -> None:
        self._run.log({"iteration": iteration, name: self._wandb.Image(picture)})

    def finished(self, reason: str) -> None:
        self._run.finish()


def build_writers(names: list[str], folder: Path, done: int = 0) -> list[Writer]:
    """The writers of run.writers; `done` iterations are behind a resumed run.

    Raises:
        ImportError: a package is missing; says how to install it.
    """
    kinds: dict[str, type[Writer]] = {"tensorboard": TensorBoardWriter, "wandb": WandbWriter}
    return [kinds[name](folder, done) for name in names]  # type: ignore[call-arg]
