"""Inside a worker process: a training that stops after every iteration, reports it, and answers until the next.

A worker of hrf_fast runs the real `hrf_fast.train.train` and stops where an iteration has been logged. So what is timed
is what a user runs, whatever the loop looks like inside, logging included. It reaches in at two places, `build_parts`
and `Run.log`. A worker of the literal loop runs benchmarks/training_bench/literal.py.
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

from benchmarks.training_bench.memory import SavedTensors, resident_bytes
from hrf_fast.devices import peak_memory_bytes

OUTPUT = "output.txt"


def serve(link: Connection, kind: str, words: list[str], folder: Path, threads: int, saved: bool) -> None:
    """Body of the process."""
    from hrf_fast.config.load import load_config

    # Ctrl-C is the parent's, which kills its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        folder.mkdir(parents=True)
        # its notes would tear the progress bar
        output = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT)
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
    """The real training, which meets the server after each logged iteration."""
    import hrf_fast.train as module
    from hrf_fast.run.folder import Run

    build, log = module.build_parts, Run.log

    def built(config: Any) -> Any:
        parts = build(config)
        policy = parts.policy
        output = policy.model_output

        def bare(latents: Any, timestep: Any) -> Any:
            with policy.uncounted():
                return output(latents, timestep)

        server.watch(policy.unet, bare, policy.device)
        if config.compute.compile != "none":
            # a hook on a compiled module would be compiled too: calls are seen one layer above it
            policy.model_output = server.calls.around(output)
        else:
            policy.unet.register_forward_pre_hook(server.calls.hook, with_kwargs=True)
        return parts

    def logged(run: Any, iteration: int, record: dict[str, Any], **timed: Any) -> None:
        log(run, iteration, record, **timed)
        server.meet(record)

    module.build_parts, Run.log = built, logged
    with server.meter():
        module.train(config)


def _run_literal(config: Any, server: Server) -> None:
    from benchmarks.training_bench.literal import LiteralTrainer

    trainer = LiteralTrainer(config)
    server.watch(trainer.unet, lambda latents, timestep: trainer.unet(latents, timestep).sample, trainer.noise.device)
    server.save("initial")
    trainer.unet.register_forward_pre_hook(server.calls.hook, with_kwargs=True)
    with server.meter():
        for iteration in range(config.train.iterations):
            trainer.prepare(iteration)
            server.begin()
            server.meet(trainer.iteration(iteration))


class Calls:
    """UNet calls of one iteration: (images, with gradient, timestep), seen by a forward pre-hook."""

    def __init__(self) -> None:
        self.made: list[tuple[int, bool, Any]] = []
        self.counting = True

    def see(self, latents: Any, timestep: Any) -> None:
        if self.counting:
            self.made.append((len(latents), torch.is_grad_enabled(), timestep))

    def hook(self, module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.see(*[*arguments, *named.values()][:2])

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(latents: Any, timestep: Any) -> Any:
            self.see(latents, timestep)
            return function(latents, timestep)

        return counted


class Server:
    """The worker's side: answers requests between iterations."""

    def __init__(self, link: Connection, folder: Path, saved: bool) -> None:
        self.link, self.folder = link, folder
        self.calls = Calls()
        # what the imports take: everything above it is the model, its optimizer and training
        self.baseline = resident_bytes()
        self.began: float | None = None
        self.saved = SavedTensors() if saved else None

    def watch(self, unet: Any, output: Callable[..., Any], device: Any) -> None:
        """What to measure: the model, a call of it as the run makes it, and where it is."""
        self.unet, self.output, self.device = unet, output, device
        if device.type == "cuda":
            self.baseline = 0
        if self.saved:
            self.saved.ignore([*unet.parameters(), *unet.buffers()])

    def meter(self) -> AbstractContextManager[object]:
        return self.saved.counting() if self.saved else nullcontext()

    def begin(self) -> None:
        """An iteration starts now."""
        self.calls.made.clear()
        if self.saved:
            self.saved.reset()
        self._synchronize()
        self.began = time.perf_counter()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def meet(self, record: dict[str, Any]) -> None:
        """An iteration is done: report it, and answer until the next one is asked for."""
        self._synchronize()
        seconds = time.perf_counter() - self.began if self.began is not None else None
        report = {
            "seconds": seconds,
            "peak_bytes": peak_memory_bytes(self.device) - self.baseline,
            "saved_bytes": self.saved.peak if self.saved else None,
            "batches": len(self.calls.made),
            "images": sum(count for count, _, _ in self.calls.made),
            "images_with_gradient": sum(count for count, gradient, _ in self.calls.made if gradient),
            "image_shape": self._shape(),
            "record": record,
        }
        self.link.send(("done", report))
        while (request := self.link.recv()) != "iterate":
            self.link.send(("done", getattr(self, f"_{request}")()))
        self.begin()

    def _bare(self) -> float:
        """Replay the recorded calls: a forward without gradient, or a forward and at once its backward."""
        inputs = {count: torch.randn(count, *self._shape(), device=self.device) for count, _, _ in self.calls.made}
        self.calls.counting = False
        self._synchronize()
        began = time.perf_counter()
        for count, gradient, timestep in self.calls.made:
            with torch.set_grad_enabled(gradient):
                output = self.output(inputs[count], timestep)
            if gradient:
                output.backward(torch.ones_like(output))
        self._synchronize()
        seconds = time.perf_counter() - began
        self.unet.zero_grad(set_to_none=True)
        self.calls.counting = True
        return seconds

    def _shape(self) -> tuple[int, int, int]:
        return (self.unet.config.in_channels, *[self.unet.config.sample_size] * 2)

    def save(self, name: str) -> str:
        path = self.folder / f"{name}.safetensors"
        save_file({name: value.detach().cpu().contiguous() for name, value in self.unet.state_dict().items()}, path)
        return str(path)

    def _weights(self) -> str:
        return self.save("weights")
