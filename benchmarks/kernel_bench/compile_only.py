"""A Triton driver without a GPU that compiles what is launched and runs nothing: what it compiled is collected.

with collect(GPUTarget("cuda", 90, 32), [kernel]) as compiled:
    kernel[grid](cpu_tensor, n, BLOCK=1024)
compiled[0].asm["ptx"]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class _CompileOnly(DriverBase):
    """A driver for `target` whose launches do nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.utils = target, self

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args, **kwargs: None

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple[Any, ...]:
        return None, None, 0, 0, 1024

    def unload_module(self, module: None) -> None:
        pass

    def get_device_properties(self, device: str) -> dict[str, int]:
        # limits that Triton checks before a launch; an A100's shared memory, the least of the four but for gfx942
        return {"max_shared_mem": 65536 if self.target.backend == "hip" else 166912, "max_num_regs": 65536}

    @classmethod
    def is_active(cls) -> bool:
        return False  # never by itself

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels per device
        return f"compile only: {self.target}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is launched")


@contextlib.contextmanager
def collect(target: GPUTarget, kernels: Sequence[Any]) -> Iterator[list[Any]]:
    """Compile for `target` what the block launches of `kernels`, JIT functions.

    Afterwards the list holds the compiled kernels, and Triton is as it was.
    """
    compiled: list[Any] = []
    # not .active, which looks for a GPU
    previous, driver = triton.runtime.driver._active, _CompileOnly(target)
    triton.runtime.driver.set_active(driver)
    try:
        yield compiled
        for kernel in kernels:
            compiled.extend(kernel.device_caches[driver.get_current_device()][0].values())
    finally:
        triton.runtime.driver._active = previous
        for kernel in kernels:
            kernel.device_caches.pop(driver.get_current_device(), None)
