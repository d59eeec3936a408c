"""Training processes that advance one iteration on request, so that several can be timed in turns.

The parent's side; what a worker does is in serving.py. Each has a process of its own, so its peak memory is its own.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.training_bench.serving import OUTPUT, serve

# a worker is forked from a process that has imported these
_PRELOAD = ["diffusers.models.unets.unet_2d", "diffusers.schedulers.scheduling_ddim", "hrf_fast.train"]


class WorkerError(RuntimeError):
    """A worker failed; `refused` where it said that its options can't work here."""

    def __init__(self, message: str, *, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused


class Worker:
    """A process with a model and an optimizer; iteration 0, its warm-up, is done when it is started."""

    def __init__(self, kind: str, words: Sequence[str], *, folder: Path, threads: int, saved: bool = False) -> None:
        """Start; `ready` waits for it.

        Args:
            kind: "ours" or "literal"; words: its configuration, as `hrf train` takes it.
            folder: for whatever it writes; it must not exist yet.
            threads: of torch; saved: count the bytes of tensors saved for the backward (slow).
        """
        context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
        if os.name == "posix":
            context.set_forkserver_preload(_PRELOAD)
        self.folder = folder
        self._link, other = context.Pipe()
        arguments = (other, kind, [*words, f"run.folder={folder / 'run'}"], folder, threads, saved)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        other.close()
        self.first: dict[str, Any] = {}

    def ready(self) -> dict[str, Any]:
        """Wait for iteration 0; returns what it says of itself.

        Raises:
            WorkerError: it could not start.
        """
        self.first = self.first or self._receive()
        return self.first

    def iterate(self) -> dict[str, Any]:
        """One iteration: {seconds, peak_bytes, batches, images, saved_bytes, and its record as in metrics.jsonl}."""
        return self._ask("iterate")

    def bare(self) -> float:
        """Seconds of nothing but the UNet calls of the last iteration, forwards and backwards at the same sizes."""
        return self._ask("bare")

    def weights(self) -> dict[str, Any]:
        """Current weights of the UNet, by name."""
        return load_file(self._ask("weights"))

    def initial_weights(self) -> dict[str, Any]:
        """Weights before training, of a literal worker."""
        return load_file(self.folder / "initial.safetensors")

    def stop(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._link.close()

    def _said(self) -> str:
        """Its standard output and errors."""
        path = self.folder / OUTPUT
        return path.read_text(errors="replace") if path.exists() else ""

    def _ask(self, request: str) -> Any:
        self._link.send(request)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer, value = self._link.recv()
        except EOFError as error:
            self._process.join()
            code = self._process.exitcode
            raise WorkerError(
                f"a worker ended with exit code {code}: killed, or out of memory", refused=False
            ) from error
        if answer != "done":
            raise WorkerError(value, refused=answer == "refused")
        return value
