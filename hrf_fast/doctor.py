"""Doctor: what works on this machine, what does not, and the way out, as one table.

Optional packages are looked up and not imported, so that a broken one can't stop the examination and it takes a second
besides torch. Left out: values of environment variables and anything about accounts, so the table can be posted.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hrf_fast import __version__
from hrf_fast.assets import ASSETS, SHIPPED

INSTALL = {
    "diffusers": "hrf_fast",
    "transformers": "hrf_fast[rewards]",
    **dict.fromkeys(("triton", "deepspeed", "bitsandbytes", "xformers"), "hrf_fast[gpu]"),
    **dict.fromkeys(("tensorboard", "wandb"), "hrf_fast[writers]"),
}
HUB_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
CPU_FLAGS, MEMORY = Path("/proc/cpuinfo"), Path("/proc/meminfo")
GIB = 2**30


def examine() -> str:
    """The table, a line per part: its name, then "ok …", "missing: …", or what was found. Never raises."""
    parts: dict[str, Callable[[], str]] = {
        "hrf_fast": lambda: f"ok {__version__}",
        "python": lambda: f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform,
        "CPU": _cpu,
        "CPU bf16": _cpu_bf16,
        "memory": _memory,
        "disk": _disk,
        "torch": _torch,
        "GPU": _gpu,
        **{name: partial(_package, name) for name in INSTALL},
        "launcher": _launcher,
        **{f"model {name}": partial(_shipped, name) for name in SHIPPED},
        "hub cache": _hub_cache,
        "training": _training,
    }
    width = max(map(len, parts))
    return "\n".join(f"{name:<{width}}  {_safely(look)}" for name, look in parts.items())


class Unavailable(Exception):
    """What a part needs is not there; the message goes into the table."""


def _safely(look: Callable[[], str]) -> str:
    try:
        return look()
    except Unavailable as reason:
        return str(reason)
    except Exception as error:
        # not its message, which may quote the environment
        return f"unknown: {type(error).__name__} while looking"


def _import_torch() -> Any:
    if find_spec("torch") is None:
        raise Unavailable('missing: pip install "torch>=2.4"')
    import torch

    return torch


def _cpu() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{os.cpu_count()} threads, {usable} usable"


def _cpu_bf16() -> str:
    if not CPU_FLAGS.is_file():
        return f"unknown: this system has no {CPU_FLAGS}"
    words = set(CPU_FLAGS.read_text().split())
    found = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in words]
    return f"ok {', '.join(found)}" if found else "no avx512_bf16 or amx_bf16: train.precision=bf16 is emulated"


def _memory() -> str:
    if not MEMORY.is_file():
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.1f} GiB, free unknown"
    kib = {line.split(":")[0]: int(line.split()[1]) for line in MEMORY.read_text().splitlines()}
    return f"{kib['MemTotal'] / 2**20:.1f} GiB, {kib['MemAvailable'] / 2**20:.1f} GiB free"


def _disk() -> str:
    usage = shutil.disk_usage(".")
    return f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} GiB in the current folder"


def _torch() -> str:
    torch = _import_torch()
    cuda, rocm = torch.version.cuda, torch.version.hip
    build = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPU"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"ok {torch.__version__} ({build} build; on CPU {torch.get_num_threads()} threads, {capability})"


def _gpu() -> str:
    torch = _import_torch()
    if not (torch.version.cuda or torch.version.hip):
        return "none: this torch is a CPU build; with a GPU, install the build that pytorch.org names for it"
    if not torch.cuda.is_available():
        return "none: torch sees no GPU; check the driver with nvidia-smi or rocm-smi, and CUDA_VISIBLE_DEVICES"
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        # NVIDIA computes in bf16 since Ampere, 8.0
        bf16 = "bf16" if torch.version.hip or device.major >= 8 else "no bf16"
        devices.append(f"cuda:{index} {device.name} {device.total_memory / GIB:.0f} GiB {bf16}")
    return f"ok {', '.join(devices)}"


def _package(name: str) -> str:
    """Whether a package is installed, without importing it; and where that is not enough, what else it needs."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return f'missing: pip install "{INSTALL[name]}"'
    if find_spec(name) is None:
        return f"broken: {found} is installed but can't be imported; pip install --force-reinstall {name}"
    if name == "triton" and not _has_gpu():
        return f"ok {found}, but no GPU: its kernels run in the interpreter only (TRITON_INTERPRET=1, slow, for tests)"
    if name == "xformers" and not _has_gpu():
        return f"ok {found}, but no GPU: it has no CPU operators"
    return f"ok {found}"


def _has_gpu() -> bool:
    return bool(_import_torch().cuda.is_available())


def _launcher() -> str:
    if shutil.which("deepspeed"):
        return "ok: `deepspeed` is on PATH"
    try:
        version("deepspeed")
    except PackageNotFoundError:
        return f'missing: pip install "{INSTALL["deepspeed"]}" brings `deepspeed`'
    return "missing: `deepspeed` is installed but not on PATH; activate its environment"


def _shipped(name: str) -> str:
    needed = {
        "model": "model/unet/*.safetensors",
        "scorer": "scorer/*.safetensors",
        "reference images": "reference.safetensors",
    }
    lacking = [part for part, pattern in needed.items() if not any((ASSETS / name).glob(pattern))]
    return f"missing: its {' and '.join(lacking)}; reinstall hrf_fast" if lacking else f"ok {', '.join(needed)}"


def _hub_cache() -> str:
    """Where models from the hub are kept; a folder chosen by a variable is named by the variable."""
    chosen = next((name for name in HUB_VARIABLES if os.environ.get(name)), None)
    base = Path(os.environ[chosen]).expanduser() if chosen else Path.home() / ".cache"
    below = {"HF_HOME": "hub", "HF_HUB_CACHE": "", "HUGGINGFACE_HUB_CACHE": ""}
    folder = base / below.get(chosen or "", "huggingface/hub")
    shown = f"the folder that {chosen} sets" if chosen else "~/.cache/huggingface/hub"
    if not folder.is_dir():
        return f"empty: {shown} is made by the first download"
    return f"ok {len(list(folder.glob('models--*')))} models in {shown}"


def _training() -> str:
    device = "cuda" if _has_gpu() else "cpu"
    return f"ok on {device}, the device of run.device=auto" if find_spec("diffusers") else "no: diffusers is missing"
