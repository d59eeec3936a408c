"""Devices: which one runs, and how much memory it has needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

from hrf_fast.distributed import comm, launcher

try:
    import resource
except ImportError:
    # Windows
    resource = None  # type: ignore[assignment]


# environment variables that are not the user's
_ours: set[str] = set()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the device's allocator on CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return int(psutil.Process().memory_info().peak_wset)
    # Linux counts in KiB, macOS in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def set_up(device: torch.device, *, deterministic: bool) -> None:
    """Make a device the current one, and set its flags; see `set_precision_flags`."""
    if device.type == "cuda":
        # events and synchronize() are the current device's, and so is what a user's reward calls "cuda"
        torch.cuda.set_device(device)
    set_precision_flags(device, deterministic=deterministic)


def set_precision_flags(device: torch.device, *, deterministic: bool) -> None:
    """Set what torch leaves open on CUDA: TF32, how cudnn chooses its convolutions, and which attention it takes.

    Args:
        deterministic: the same seed gives the same bits, and fp32 is fp32; False takes TF32 and cudnn's fastest.

    Raises:
        ValueError: False without CUDA.
    """
    if device.type != "cuda":
        if not deterministic:
            raise ValueError(
                f"compute.deterministic is false, which needs CUDA, but the device is {device}; set it to true"
            )
        return
    # torch's own default is TF32 in convolutions and not in matrix products
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    # cudnn's attention, torch's first choice on some cards, has a backward that asks no flag and adds up in any order
    torch.backends.cuda.enable_cudnn_sdp(not deterministic)
    # sums by atomic additions differ from run to run; `deterministic_backward` is stricter than a warning, which is for
    # what rewards may compute
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def deterministic_backward() -> Iterator[None]:
    """Inside, operations without a deterministic form are errors, where `set_precision_flags` asks for such forms.

    Fused attention takes the deterministic form of its backward in this mode alone: where torch only warns, it warns
    and adds up in any order. A forward stays outside: torch holds a compiled graph to the mode.

    Raises:
        ValueError: names the operation, and the way out.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" in str(error):
            raise ValueError(
                "compute.deterministic is true, but a matrix product was made on CUDA before hrf_fast was imported; "
                "import hrf_fast first, or set CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts"
            ) from error
        if "does not have a deterministic implementation" not in str(error):
            raise
        reason = str(error).split(", but you set")[0]
        raise ValueError(f"compute.deterministic is true, but {reason}; set compute.deterministic=false") from error
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warns)


def trial_backward(forward: Callable[[], Tensor], weights: Sequence[Tensor]) -> None:
    """Call `forward` and the backward of its output as an update does; the gradients of `weights` are thrown away."""
    with torch.enable_grad():
        output = forward()
    # blocks that run again in it are graphs of its mode
    with deterministic_backward():
        torch.autograd.grad(output, weights, torch.ones_like(output), allow_unused=True)


def choose_device(name: str) -> torch.device:
    """The device of run.device; without a number, the GPU of this rank.

    Raises:
        ValueError: not a device, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and comm.world_size() > 1:
        name = f"cuda:{launcher.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"run.device is {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"run.device is {name!r}; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device.type == "cuda" and device.index >= torch.cuda.device_count() and comm.world_size() > 1:
        raise ValueError(
            f"LOCAL_RANK is {device.index} but torch sees {torch.cuda.device_count()} GPUs on this machine; start a "
            "rank for each GPU, or set run.device=cpu"
        )
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"run.device is {name!r} but torch sees {torch.cuda.device_count()} GPUs; use auto or cpu")
    if device.type == "cpu" and "DS_ACCELERATOR" not in os.environ:
        # peft and transformers import DeepSpeed where it is installed, and it warns that it has found no GPU
        os.environ["DS_ACCELERATOR"] = "cpu"
        _ours.add("DS_ACCELERATOR")
    elif device.type == "cuda" and _ours:
        # something was drawn or exported on the CPU before
        os.environ.pop(_ours.pop(), None)
    return device
