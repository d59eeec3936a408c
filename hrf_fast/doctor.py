"""Doctor: what works on this machine, what does not, and the way out, as one table.

Optional packages are looked up and not imported, so that a broken one can't stop the examination and it takes a second
besides torch; DeepSpeed says in a process of its own which of its ops would compile. Left out: values
of environment variables and anything about accounts, so the table can be posted.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from hrf_fast import cpu
from hrf_fast.assets import ASSETS, DATA, SHIPPED
from hrf_fast.config.options import OPTIMIZERS
from hrf_fast.version import __version__

INSTALL = {
    "diffusers": "hrf_fast",
    "transformers": "transformers>=5.4",
    **dict.fromkeys(("triton", "deepspeed", "bitsandbytes", "xformers"), "hrf_fast[gpu]"),
    **dict.fromkeys(("tensorboard", "wandb"), "hrf_fast[writers]"),
}
HUB_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
GIB = 2**30
# the last line of output: each op, whether it is built already, whether it would compile here
_PROBE = """
import json
import deepspeed.ops
from deepspeed.git_version_info import installed_ops
ops = deepspeed.ops.__compatible_ops__
print(json.dumps({op: [installed_ops.get(op, False), ops[op]] for op in ops if op != "deepspeed_not_implemented"}))
"""


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
        "deepspeed ops": _deepspeed_ops,
        "kernels": _kernels,
        "optimizers": _optimizers,
        "attention": _attention,
        "compile": _compile,
        "launcher": _launcher,
        **{f"model {name}": partial(_shipped, name) for name in SHIPPED},
        "hub cache": _hub_cache,
        "training": _training,
    }
    width = max(map(len, parts))
    return "\n".join(f"{name:<{width}}  {_safely(look)}" for name, look in parts.items())


class Unavailable(Exception):
    """Raised where a part lacks something that it needs; the message goes into the table."""


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
        raise Unavailable('missing: pip install "torch>=2.8"')
    import torch

    return torch


def _cpu() -> str:
    return f"{os.cpu_count()} threads, {cpu.usable_cpus()} usable"


def _cpu_bf16() -> str:
    units = cpu.cpu_bf16_units()
    if units is None:
        return f"unknown: this system has no {cpu.CPU_FLAGS}"
    return f"ok {', '.join(units)}" if units else "no avx512_bf16 or amx_bf16: compute.precision=bf16 is emulated"


def _memory() -> str:
    memory = psutil.virtual_memory()
    return f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB free"


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
        installed = version(name)
    except PackageNotFoundError:
        return f'missing: pip install "{INSTALL[name]}"'
    if find_spec(name) is None:
        return f"broken: {installed} is installed but can't be imported; pip install --force-reinstall {name}"
    if name == "triton" and not _has_gpu():
        return (
            f"ok {installed}, but no GPU: its kernels run in the interpreter only (TRITON_INTERPRET=1, slow, for tests)"
        )
    if name == "xformers" and not _has_gpu():
        return f"ok {installed}, but no GPU: it has no CPU operators"
    return f"ok {installed}"


def _usable(name: str) -> bool:
    return _package(name).startswith("ok")


def _deepspeed_ops() -> str:
    if not _usable("deepspeed"):
        return _package("deepspeed")
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=60)
    if probe.returncode:
        # the type alone: the message may quote the environment
        return f"broken: importing deepspeed fails with {probe.stderr.strip().splitlines()[-1].split(':')[0]}"
    ops: dict[str, list[bool]] = json.loads(probe.stdout.strip().splitlines()[-1])
    groups = {
        "built": [op for op, (built, _) in ops.items() if built],
        "compiled on first use": [op for op, (built, able) in ops.items() if able and not built],
        "not on this machine": [op for op, (built, able) in ops.items() if not able and not built],
    }
    tools = [tool for tool in ("g++", "ninja") if not shutil.which(tool)]
    state = f"no compiler: {' and '.join(tools)} not on PATH; " if tools else "ok; "
    return state + "; ".join(f"{title}: {', '.join(names)}" for title, names in groups.items() if names)


def _kernels() -> str:
    """Which backend the kernels take by themselves."""
    from hrf_kernels import choose_backend

    backend, why = choose_backend("auto", "cuda" if _has_gpu() else "cpu")
    return f"ok {backend} by itself: {why}"


def _optimizers() -> str:
    """Values that optimizer.name can have here."""
    usable = ["adamw", "fused_adamw"]
    if _usable("deepspeed") and shutil.which("g++") and shutil.which("ninja"):
        usable.append("cpu_adam (with ZeRO offload)")
    if _usable("bitsandbytes"):
        usable += ["adamw_8bit", "paged_adamw_8bit"] if _has_gpu() else ["adamw_8bit (slow on CPU)"]
    lacking = [name for name in OPTIMIZERS if not any(name == word.split(" ")[0] for word in usable)]
    needs = {"cpu_adam": "deepspeed, g++, ninja", "adamw_8bit": "bitsandbytes", "paged_adamw_8bit": "bitsandbytes, GPU"}
    return f"ok {', '.join(usable)}" + "".join(f"; {name} needs {needs[name]}" for name in lacking)


def _attention() -> str:
    """Values that compute.attention can have here."""
    if _usable("xformers") and _has_gpu():
        return "ok sdpa, xformers"
    return "ok sdpa; xformers needs " + ("a GPU" if _usable("xformers") else "its package and a GPU")


def _compile() -> str:
    """Whether compute.compile works here."""
    from hrf_fast.policies.compilation import obstacle

    device = "cuda" if _has_gpu() else "cpu"
    reason = obstacle(device)
    return f"no: on {device} {reason}" if reason else f"ok on {device}: none, unet, blocks"


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
    data = DATA.get(name, name)
    needed = {
        "model": f"{name}/model/unet/*.safetensors",
        "classifier": f"{data}/classifier/*.safetensors",
        "reference images": f"{data}/reference.safetensors",
    }
    lacking = [part for part, pattern in needed.items() if not any(ASSETS.glob(pattern))]
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
