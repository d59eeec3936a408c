"""What the benchmarks share: facts about the machine, memory, and a Markdown table."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hrf_fast.devices import peak_memory_bytes

# flags of /proc/cpuinfo whose units compute in bf16: without them bf16 is slower than fp32
_BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")


def machine(device: Any, threads: int) -> dict[str, Any]:
    """What a figure depends on: hardware, threads, versions, commit and how busy the machine was."""
    import torch

    fields = _cpu_fields()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": gpu.name if gpu else "cpu",
        "gpu_memory_bytes": gpu.total_memory if gpu else None,
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "bf16_units": [flag for flag in _BF16_UNITS if flag in flags]
        + (["cuda"] if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else []),
        "threads": threads,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "numpy")},
        "commit": _commit(),
    }


def describe(facts: dict[str, Any]) -> str:
    """The same in one line of Markdown."""
    units = ", ".join(facts["bf16_units"]) or "none"
    device = "" if facts["device"] == "cpu" else f"{facts['device']}, "
    load = f", load average {facts['load_average'][0]:.1f} before it" if facts["load_average"] else ""
    return (
        f"{device}{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, bf16 units: {units}; "
        f"torch {facts['versions']['torch']}, commit {facts['commit']}{load}"
    )


def _cpu_fields() -> dict[str, str]:
    """First processor of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _commit() -> str:
    """Short hash of the checkout, with -dirty where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def resident_bytes() -> int:
    """Resident set of this process now; its peak so far where the system doesn't say."""
    import torch

    path = Path("/proc/self/statm")
    if path.exists():
        return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory_bytes(torch.device("cpu"))


class SavedTensors:
    """Live bytes of the tensors that autograd holds for a backward, each storage once, and their peak."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        # storage address -> [bytes, holders]
        self._storages: dict[int, list[int]] = {}
        self._ignored: set[int] = set()

    def ignore(self, tensors: Sequence[Any]) -> None:
        """Weights are saved too, but are there anyway."""
        self._ignored |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def reset(self) -> None:
        self.peak = self.live

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved inside; gradient checkpointing has hooks of its own and is seen at its blocks' edges."""
        import torch

        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(self, tensor), lambda held: held.tensor):
            yield

    def hold(self, address: int, size: int) -> None:
        entry = self._storages.setdefault(address, [size, 0])
        entry[1] += 1
        if entry[1] == 1:
            self.live += size
            self.peak = max(self.peak, self.live)

    def release(self, address: int) -> None:
        entry = self._storages[address]
        entry[1] -= 1
        if entry[1] == 0:
            self.live -= self._storages.pop(address)[0]


class _Held:
    """What autograd keeps instead of a saved tensor: it dies with the graph."""

    def __init__(self, counter: SavedTensors, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        # an output that held itself would keep its graph alive where no backward comes
        self.tensor, self._address = tensor.detach(), storage.data_ptr()
        self._counter = None if self._address in counter._ignored else counter
        if self._counter:
            self._counter.hold(self._address, storage.nbytes())

    def __del__(self) -> None:
        if self._counter:
            self._counter.release(self._address)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def note(text: str) -> None:
    """A line for the user that does not break a progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)
