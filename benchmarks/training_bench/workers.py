"""Training processes that advance one iteration on request, so that several can be timed in turns.

The parent's side; what a worker does is in serving.py. Each has a process of its own, so its peak memory is its own.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.training_bench.configurations import Row
from benchmarks.training_bench.serving import serve

# without a GPU a worker is forked from a process that has imported these
_PRELOAD = ["diffusers.models.unets.unet_2d", "diffusers.schedulers.scheduling_ddim", "hrf_fast.train"]
_ANOTHER_TREE = Path(__file__).with_name("another_tree.py")


class WorkerError(RuntimeError):
    """A worker failed; `refused` where it said that its options can't work here."""

    def __init__(self, message: str, *, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused


class OutOfTime(WorkerError):
    """A worker's answer did not come in time."""

    def __init__(self, message: str) -> None:
        super().__init__(message, refused=False)


class Worker:
    """A process with a model and an optimizer; iteration 0, its warm-up, is done when it is ready."""

    def __init__(self, kind: str, words: Sequence[str], *, folder: Path, threads: int, saved: bool = False) -> None:
        """Start; `ready` waits for it.

        Args:
            kind: "ours" or "literal"; words: its configuration, as `hrf train` takes it.
            folder: for whatever it writes; it must not exist yet.
            threads: of torch; saved: count the bytes of tensors saved for the backward (slow).
        """
        self.folder = folder
        self._link, other = multiprocessing.Pipe()
        self._start(other, kind, [*words, f"run.folder={folder / 'run'}"], threads, saved)
        other.close()
        self.first: dict[str, Any] = {}

    def _start(self, link: Connection, kind: str, words: list[str], threads: int, saved: bool) -> None:
        # an import may start CUDA, as xformers' does, which a fork can't go on with
        forked = os.name == "posix" and not torch.cuda.is_available()
        context = multiprocessing.get_context("forkserver" if forked else "spawn")
        if forked:
            context.set_forkserver_preload(_PRELOAD)
        arguments = (link, kind, words, self.folder, threads, saved)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        self._pid = self._process.pid

    def ready(self, until: float = math.inf) -> dict[str, Any]:
        """Wait for iteration 0; returns its report.

        Args:
            until: the time.monotonic() to wait for it.

        Raises:
            OutOfTime: it did not start by then; WorkerError: it could not start.
        """
        if not self.first:
            left = until - time.monotonic()
            if left < math.inf and not self._link.poll(max(left, 0.0)):
                raise OutOfTime("it did not start in time")
            self.first = self._receive()
        return self.first

    def processor_seconds(self) -> float:
        """Time that the process's threads have had a processor for, on Linux."""
        # CPUCLOCK_SCHED of another process, as clock_getcpuclockid(3) makes it
        return time.clock_gettime(~self._pid << 3 | 2)

    def iterate(self) -> dict[str, Any]:
        """Run one iteration: {seconds, peak_bytes, batches, images, saved_bytes, its record as in metrics.jsonl, …}."""
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
        """Kill the process."""
        self._process.kill()
        self._exit_code()
        self._link.close()

    def _exit_code(self) -> int | None:
        """Wait for the process to end."""
        self._process.join()
        return self._process.exitcode

    def _ask(self, request: str) -> Any:
        # a worker that has died says so where its answer is read
        with suppress(BrokenPipeError):
            self._link.send(request)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer, value = self._link.recv()
        except (EOFError, ConnectionResetError) as error:
            code = self._exit_code()
            raise WorkerError(
                f"a worker ended with exit code {code}: killed, or out of memory", refused=False
            ) from error
        if answer != "done":
            raise WorkerError(value, refused=answer == "refused")
        return value


class TreeWorker(Worker):
    """A worker that runs the code of the checkout `tree`; see another_tree.py."""

    def __init__(self, tree: Path, kind: str, words: Sequence[str], *, folder: Path, threads: int) -> None:
        self._tree = tree
        super().__init__(kind, words, folder=folder, threads=threads)

    def _start(self, link: Connection, kind: str, words: list[str], threads: int, saved: bool) -> None:
        request = {"kind": kind, "words": words, "folder": str(self.folder), "threads": threads}
        command = [sys.executable, str(_ANOTHER_TREE), str(self._tree), "serve", str(link.fileno())]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, pass_fds=[link.fileno()])
        self._pid = self._child.pid
        assert self._child.stdin is not None
        with self._child.stdin as pipe:
            json.dump(request, pipe)

    def stop(self) -> None:
        """Kill the process."""
        self._child.kill()
        self._child.wait()
        self._link.close()

    def _exit_code(self) -> int | None:
        return self._child.wait()


def start_worker(row: Row, words: Sequence[str], *, folder: Path, threads: int) -> Worker:
    """A worker of the row's checkout."""
    if row.tree:
        return TreeWorker(row.tree, row.kind, words, folder=folder, threads=threads)
    return Worker(row.kind, words, folder=folder, threads=threads)


def table_of_tree(tree: Path, model: str, method: str, arguments: dict[str, Any]) -> list[tuple[Row, list[str]]]:
    """The rows of a method in the checkout `tree`, each with its configuration in the options of that checkout.

    Raises:
        ValueError: its benchmarks can't say.
    """
    request = json.dumps({"model": model, "method": method, "arguments": arguments})
    command = [sys.executable, str(_ANOTHER_TREE), str(tree), "table"]
    result = subprocess.run(command, input=request, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"--against is {tree}, whose benchmarks fail: {result.stderr.strip().splitlines()[-1]}")
    table = json.loads(result.stdout)
    return [(Row(name, {}, kind=kind, tree=tree), words) for name, kind, words in table]
