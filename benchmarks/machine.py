"""The machine that a figure was measured on, and the commit: without them a figure means nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hrf_fast.cpu import cpu_bf16_units, cpu_name

_PACKAGES = ("torch", "triton", "diffusers", "numpy")


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Hardware, threads, versions, commit and how busy the machine is, as the JSON files have it."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    gpu_bf16 = ["cuda"] if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else []
    return {
        "device": gpu.name if gpu else "cpu",
        "gpu_memory_bytes": gpu.total_memory if gpu else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "bf16_units": [*(cpu_bf16_units() or []), *gpu_bf16],
        "threads": threads,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": commit(),
    }


def describe(facts: dict[str, Any]) -> str:
    """One line of Markdown about what `machine` returned."""
    units = ", ".join(facts["bf16_units"]) or "none"
    device = "" if facts["device"] == "cpu" else f"{facts['device']}, "
    load = f", load average {facts['load_average'][0]:.1f} before it" if facts["load_average"] else ""
    return (
        f"{device}{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, bf16 units: {units}; "
        f"torch {facts['versions']['torch']}, commit {facts['commit']}{load}"
    )


def commit(tree: Path = Path(__file__).parent) -> str:
    """Short hash of a checkout, with -dirty where files differ from it; unknown without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
