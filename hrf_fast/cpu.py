"""CPU: its name, how much of it is usable, and whether it computes in bf16.

No torch here: `hrf doctor` says so without one that works.
"""

from __future__ import annotations

import platform
from pathlib import Path

import psutil

CPU_FLAGS = Path("/proc/cpuinfo")
# flags of CPUs that compute in bf16, the last one Arm's
BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16")


def cpu_name() -> str:
    """The processor's model as the system names it."""
    lines = CPU_FLAGS.read_text().splitlines() if CPU_FLAGS.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def usable_cpus() -> int:
    """How many processors this process may run on."""
    process = psutil.Process()
    # macOS has no affinity
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1


def cpu_bf16_units() -> list[str] | None:
    """Flags of the CPU's bf16 units, without which bf16 is emulated; None where the system doesn't say."""
    if not CPU_FLAGS.is_file():
        return None
    words = set(CPU_FLAGS.read_text().split())
    return [flag for flag in BF16_UNITS if flag in words]


def emulation_note(precision: str, device: str) -> str:
    """A line for the user of a CPU without units for compute.precision; else empty. `device` is cpu or cuda."""
    if device == "cpu" and precision == "bf16" and cpu_bf16_units() == []:
        return (
            "compute.precision is bf16, which this CPU emulates (no avx512_bf16 or amx_bf16): 30 to 70 times slower "
            "than fp32 was measured on one; use compute.precision=fp32"
        )
    return ""
