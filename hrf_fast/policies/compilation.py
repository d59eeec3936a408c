"""Compilation: torch.compile for a denoiser's forward, whole or block by block, in a fixed small number of graphs.

Compiled are the forward functions: modules, the names of their weights and what is saved stay as they are. Timesteps
come in as tensors and the batch dimension is dynamic, so neither steps, windows nor batch sizes compile again: there is
a graph with and one without gradient, and the same two once more for batches of one, which torch treats as constant.
`fullgraph` makes an error of whatever would fall back to eager. Left out: CUDA graphs (docs/decisions.md says why).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

# the tests put a cheap one here
BACKEND: str | Callable[..., Any] = "inductor"


def obstacle(device_type: str) -> str | None:
    """Why torch.compile can't work for a device type on this machine; None if nothing stands in its way.

    Inductor writes C++ for a CPU. For a GPU it writes Triton, whose launcher is C.
    """
    if device_type == "cuda":
        if find_spec("triton") is None:
            return 'it needs Triton: pip install "hrf_fast[gpu]"'
        if torch.version.hip is None and torch.cuda.get_device_capability()[0] < 7:
            return "Triton needs a GPU of compute capability 7.0 or newer"
        language, names = "c", [os.environ.get("CC", ""), "gcc", "clang"]
    else:
        language, names = "c++", [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    compiler = next((name for name in names if name and shutil.which(name)), None)
    title, variable = {"c": ("C", "CC"), "c++": ("C++", "CXX")}[language]
    if compiler is None:
        tried = " or ".join(filter(None, names))
        return f"it needs a {title} compiler, and there is no {tried} on PATH: install one, or name it in {variable}"
    command = [compiler, "-x", language, "-fsyntax-only", "-I", sysconfig.get_path("include"), "-"]
    if subprocess.run(command, input="#include <Python.h>\n", text=True, capture_output=True).returncode:
        return f"{compiler} can't compile {title} with Python.h: install Python's headers (such as python3-dev)"
    return None


def check_compile(mode: str, device: torch.device) -> None:
    """Refuse compute.compile where it can't work, so that nothing falls back to eager in silence.

    Raises:
        ValueError: says what is missing and the way out.
    """
    if mode != "none" and (reason := obstacle(device.type)):
        raise ValueError(f"compute.compile is {mode!r} on {device.type}, but {reason}; or use compute.compile=none")


def compile_network(modules: Sequence[Any]) -> None:
    """Let each module's forward run compiled, as one graph: a whole denoiser, or its blocks one by one."""
    for number, module in enumerate(modules):
        # as nn.Module.compile does, which would compile one code object for all blocks: torch counts graphs, and looks
        # for the right one, per code object, and gives up at 8
        module._compiled_call_impl = _compiled(module, f"{type(module).__name__}_{number}")


def _compiled(module: Any, name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    run.__code__ = run.__code__.replace(co_name=name)
    function = torch.compile(run, fullgraph=True, dynamic=False, backend=BACKEND)

    def call(*args: Any, **kwargs: Any) -> Any:
        _mark_batch([args, list(kwargs.values())])
        return function(*args, **kwargs)

    return call


def _mark_batch(value: Any) -> None:
    """Make the batch, which is the first dimension of the first tensor and of others, a variable of the graph.

    The positions of a transformer's tokens have no batch.
    """
    tensors = [part for part in tree_iter(value) if isinstance(part, Tensor)]
    for tensor in tensors:
        # torch compiles a size of 1 as a constant, and refuses the wish for anything else
        if len(tensor) == len(tensors[0]) > 1:
            torch._dynamo.mark_dynamic(tensor, 0)


def canonical(latents: Tensor, timesteps: float | Tensor) -> tuple[Tensor, Tensor]:
    """The inputs of a compiled denoiser, in the one form that its graphs are made for.

    Args:
        latents: [B, …]; its strides may differ in dimensions of size 1, which would compile again.
        timesteps: one value or [B].

    Returns:
        Contiguous latents, and timesteps [B].
    """
    count = len(latents)
    if isinstance(timesteps, Tensor):
        # not expand: it leaves a stride of 0, even in a batch of one that counts as contiguous
        timesteps = torch.empty(count, dtype=timesteps.dtype, device=latents.device).copy_(timesteps)
    else:
        timesteps = torch.full((count,), timesteps, device=latents.device)
    return latents.flatten().view(latents.shape), timesteps
