"""Where a run's numbers go besides its files: the terminal, TensorBoard, Weights & Biases.

The last two are optional packages and take no credential from a config: W&B uses what `wandb login` stored.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class Writer(Protocol):
    """A place for scalars and images of an iteration."""

    def scalars(self, iteration: int, values: dict[str, float]) -> None: ...

    def images(self, iteration: int, name: str, images: Tensor) -> None: ...

    def close(self) -> None: ...


class TensorBoardWriter:
    """Event files in run_dir/tensorboard."""

    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('run.writers has tensorboard: `pip install "hrf_fast[writers]"`') from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done or None)

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def images(self, iteration: int, name: str, images: Tensor) -> None:
        from hrf_fast.evaluation.grids import image_grid

        self._writer.add_image(name, _array(image_grid(images)), iteration, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
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
            known.write_text(uuid.uuid4().hex)
        identity = known.read_text()
        try:
            self._run = wandb.init(project="hrf_fast", name=folder.name, dir=str(folder), id=identity, resume="allow")
        except Exception as error:
            raise ValueError(
                f"run.writers has wandb, which did not start ({error}); run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        self._run.log({"iteration": iteration, **values})

    def images(self, iteration: int, name: str, images: Tensor) -> None:
        from hrf_fast.evaluation.grids import image_grid

        self._run.log({"iteration": iteration, name: self._wandb.Image(image_grid(images))})

    def close(self) -> None:
        self._run.finish()


def _array(picture: Any) -> Any:
    import numpy as np

    return np.asarray(picture)


def build_writers(names: list[str], folder: Path, done: int = 0) -> list[Writer]:
    """The writers of run.writers; `done` iterations are behind a resumed run.

    Raises:
        ImportError: a package is missing; says how to install it.
    """
    kinds: dict[str, type[Writer]] = {"tensorboard": TensorBoardWriter, "wandb": WandbWriter}
    return [kinds[name](folder, done) for name in names]  # type: ignore[call-arg]
