"""Serving: inside a worker process, a training that waits after every iteration, reports it and answers requests.

A worker of hrf_fast does what `hrf_fast.train` does, build and train, with one listener more, which waits. So a turn
times what a user runs, whatever the loop looks like inside, logging included. A worker of the literal loop runs
literal.py.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.training_bench.memory import SavedTensors, resident_bytes
from hrf_fast.devices import peak_memory_bytes
from hrf_fast.run.listeners import Listener


def serve(link: Connection, kind: str, words: list[str], folder: Path, threads: int, saved: bool) -> None:
    """Body of the process; see `workers.Worker` for the arguments."""
    from hrf_fast.config.load import load_config

    # Ctrl-C is the parent's, which kills its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        folder.mkdir(parents=True)
        # notes of the training would tear the progress bar
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        config = load_config(words)
        run = _run_ours if kind == "ours" else _run_literal
        run(config, Server(link, folder, saved))
    except (ValueError, ImportError) as error:
        link.send(("refused", str(error)))
    except BaseException:
        link.send(("failed", traceback.format_exc()))


def _run_ours(config: Any, server: Server) -> None:
    from hrf_fast.assembly.components import build_components
    from hrf_fast.distributed import comm
    from hrf_fast.train import train_components

    with comm.job(config.run.lost_after), server.meter():
        config, components = build_components(config)
        network = components.policy.network
        server.watch(network, network, components.policy.device)
        train_components(config, components, [server])


def _run_literal(config: Any, server: Server) -> None:
    from benchmarks.training_bench.literal import LiteralTrainer

    trainer = LiteralTrainer(config)
    server.watch(trainer.unet, lambda *inputs, **named: trainer.unet(*inputs, **named).sample, trainer.noise.device)
    if not trainer.prompt:
        # no row of a text-to-image model is compared, whose weights are gigabytes
        server.save("initial")
    with server.meter():
        for iteration in range(config.train.iterations):
            trainer.prepare(iteration)
            server.begin()
            server.iteration(trainer.iteration(iteration))


class Server(Listener):
    """The worker's side of the link: reports an iteration and answers requests until the next one is asked for."""

    def __init__(self, link: Connection, folder: Path, saved: bool) -> None:
        self.link, self.folder = link, folder
        # network calls of an iteration: (latents' shape, with gradient, timestep, embeddings)
        self.calls: list[tuple[torch.Size, bool, Any, dict[str, Any]]] = []
        # memory of the imports: everything above it is the model, its optimizer and training
        self.baseline = resident_bytes()
        self.began: float | None = None
        self.saved = SavedTensors() if saved else None

    def watch(self, network: nn.Module, call: Callable[..., Tensor], device: torch.device) -> None:
        """Count a network's calls from here on.

        Args:
            network: called by the training with latents and a timestep; compiled inside, if at all, since a hook on a
                compiled module would be compiled too.
            call: makes such a call and returns its output.
        """
        self.network, self.call, self.device = network, call, device
        if device.type == "cuda":
            self.baseline = 0
        if self.saved:
            self.saved.ignore([*network.parameters(), *network.buffers()])
        network.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        latents, timestep = inputs
        self.calls.append((latents.shape, torch.is_grad_enabled(), timestep, named))

    def meter(self) -> AbstractContextManager[object]:
        """Count the tensors saved for the backward inside, where the worker was asked to."""
        return self.saved.counting() if self.saved else nullcontext()

    def begin(self) -> None:
        """Start the clock of an iteration."""
        self.calls.clear()
        if self.saved:
            self.saved.reset()
        self._synchronize()
        self.began = time.perf_counter()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def iteration(self, record: dict[str, Any]) -> str | None:
        """Report the iteration, and answer until the next one is asked for."""
        self._synchronize()
        seconds = time.perf_counter() - self.began if self.began is not None else None
        report = {
            "seconds": seconds,
            "peak_bytes": peak_memory_bytes(self.device) - self.baseline,
            "saved_bytes": self.saved.peak if self.saved else None,
            "batches": len(self.calls),
            "images": sum(shape[0] for shape, *_ in self.calls),
            "images_with_gradient": sum(shape[0] for shape, gradient, *_ in self.calls if gradient),
            "latent_shape": tuple(self.calls[-1][0][1:]),
            "record": record,
        }
        self.link.send(("done", report))
        while (request := self.link.recv()) != "iterate":
            self.link.send(("done", getattr(self, f"_{request}")()))
        self.begin()
        return None

    def _bare(self) -> float:
        """Seconds of the iteration's calls alone: forwards without gradient, or forwards with a backward at once."""
        calls = list(self.calls)
        inputs = {shape: torch.randn(shape, device=self.device) for shape, *_ in calls}
        self._synchronize()
        began = time.perf_counter()
        for shape, gradient, timestep, named in calls:
            with torch.set_grad_enabled(gradient):
                output = self.call(inputs[shape], timestep, **named)
            if gradient:
                output.backward(torch.ones_like(output))
        self._synchronize()
        seconds = time.perf_counter() - began
        self.network.zero_grad(set_to_none=True)
        return seconds

    def save(self, name: str) -> str:
        """Write the UNet's weights under diffusers' names; returns the file."""
        path = self.folder / f"{name}.safetensors"
        weights = {key.removeprefix("unet."): value for key, value in self.network.state_dict().items()}
        save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, path)
        return str(path)

    def _weights(self) -> str:
        return self.save("weights")
