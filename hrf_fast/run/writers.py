"""Writers: send a run's numbers to TensorBoard or Weights & Biases, every series over the iteration.

Both are optional packages and take no credential from a config: W&B uses what `wandb login` stored. A run that was
killed and goes on repeats iterations, to equal numbers; neither service shows one twice, or lacks one.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from hrf_fast.config.credentials import without_credentials
from hrf_fast.errors import writing
from hrf_fast.evaluation.grids import captions_of, image_grid, read_grid
from hrf_fast.run.files import intervals_of, write_atomically
from hrf_fast.run.folder import WANDB_ID, WANDB_SENT, RunFolder
from hrf_fast.run.listeners import Listener


class Writer(Listener):
    """Sends an iteration's numbers, and a panel's numbers and images, to a service; a subclass says how."""

    name: str
    """Its name in run.writers."""

    def send(self, iteration: int, values: dict[str, float], picture: Image.Image | None, *, panel: bool) -> None:
        """Send the numbers of an iteration, or those and the picture of the panel after so many iterations."""
        raise NotImplementedError

    def has(self, iteration: int, *, panel: bool) -> bool:
        """Whether the service has a record already, from a process before this one."""
        return False

    def catch_up(self, folder: RunFolder) -> None:
        """Send what the folder's logs hold and the service lacks, in the order in which it was logged."""
        for record, panel in folder.lines():
            if self.has(record["iteration"], panel=panel):
                continue
            if not panel:
                self.iteration(record)
                continue
            picture = None
            # one that is missing or damaged is no reason to hold a run up
            with suppress(OSError):
                picture = read_grid(folder.grid(record["iteration"]))
            self._panel(record, picture)

    def iteration(self, record: dict[str, Any]) -> None:
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        timed = {f"{name}/{k}": v for name in ("seconds", "speed") for k, v in record[name].items()}
        numbers.pop("iteration")
        self.send(record["iteration"], numbers | timed, None, panel=False)

    def panel(self, record: dict[str, Any], images: Tensor) -> None:
        self._panel(record, image_grid(images, **captions_of(record)))

    def _panel(self, record: dict[str, Any], picture: Image.Image | None) -> None:
        values = {f"panel/{name}": interval[0] for name, interval in intervals_of(record).items()}
        values |= {f"panel/kept/{name}": interval[0] for name, interval in record.get("kept", {}).items()}
        values |= {f"panel/reward/{name}": mean for name, mean in record.get("terms", {}).items()}
        self.send(record["iteration"], values, picture, panel=True)


class TensorBoardWriter(Writer):
    """Event files in RUN/tensorboard."""

    name = "tensorboard"

    def __init__(self, folder: RunFolder) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('run.writers has tensorboard: `pip install "hrf_fast[writers]"`') from error
        # hides what earlier processes have written, of which a kill may have torn the end
        self._folder = folder.path / "tensorboard"
        with writing(self._folder):
            self._writer = SummaryWriter(str(self._folder), purge_step=0)
        self.catch_up(folder)

    def send(self, iteration: int, values: dict[str, float], picture: Image.Image | None, *, panel: bool) -> None:
        with writing(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, iteration)
            if picture is not None:
                self._writer.add_image("panel", np.asarray(picture), iteration, dataformats="HWC")
            self._writer.flush()

    def finished(self, reason: str) -> None:
        with writing(self._folder):
            self._writer.close()


class WandbWriter(Writer):
    """A W&B run named after the folder, gone on with after a resume.

    W&B's own step counts records, since it may only rise: twice the iteration for a panel, one more for the iteration
    itself. Series are shown over the metric `iteration`. Records that W&B has already are not sent again.
    """

    name = "wandb"

    def __init__(self, folder: RunFolder) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError('run.writers has wandb: `pip install "hrf_fast[writers]"`, then `wandb login`') from error
        self._wandb = wandb
        known = folder.path / WANDB_ID
        if not known.exists():
            write_atomically(known, uuid.uuid4().hex.encode())
        try:
            self._run = wandb.init(
                # an argument beats the environment, where W&B would look itself
                project=os.environ.get("WANDB_PROJECT") or "hrf_fast",
                name=folder.path.name,
                dir=str(folder.path),
                id=known.read_text(),
                resume="allow",
                config=without_credentials(asdict(folder.config)),
                allow_val_change=True,
            )
            self._run.define_metric("iteration")
            self._run.define_metric("*", step_metric="iteration")
        except Exception as error:
            raise ValueError(
                f"run.writers has wandb, which did not start ({error}); run `wandb login`, or set WANDB_MODE=offline"
            ) from error
        # an offline run knows nothing of the process before it
        self._sent = folder.path / WANDB_SENT if self._run.offline else None
        remembered = int(self._sent.read_text()) if self._sent is not None and self._sent.exists() else 0
        self._next = max(self._run.starting_step, remembered)
        self.catch_up(folder)

    def has(self, iteration: int, *, panel: bool) -> bool:
        return _step(iteration, panel) < self._next

    def send(self, iteration: int, values: dict[str, float], picture: Image.Image | None, *, panel: bool) -> None:
        step = _step(iteration, panel)
        # of an iteration that a resumed run repeats
        if step < self._next:
            return
        image = {} if picture is None else {"panel": self._wandb.Image(picture)}
        self._run.log({"iteration": iteration, **values, **image}, step=step, commit=True)
        self._next = step + 1
        if self._sent is not None:
            write_atomically(self._sent, str(self._next).encode())

    def finished(self, reason: str) -> None:
        self._run.finish()


def _step(iteration: int, panel: bool) -> int:
    """W&B's step of a record: the panel after so many iterations comes before the iteration of that number."""
    return 2 * iteration + (not panel)


def build_writers(folder: RunFolder) -> list[Writer]:
    """The writers of a run's run.writers, with what its logs hold already.

    Raises:
        ImportError: a package is missing; says how to install it.
    """
    kinds: dict[str, Any] = {kind.name: kind for kind in (TensorBoardWriter, WandbWriter)}
    return [kinds[name](folder) for name in folder.config.run.writers]
