"""A Triton driver without a GPU: kernels are compiled for sm_80 or sm_90 as ever and run by the PTX interpreter.

    with ptx_machine(capability=90) as machine:
        kernel[grid](cpu_tensor, n, BLOCK=1024)
    machine.launches[-1].traffic["x"].read_bytes

Tensors are CPU tensors, and their memory is the kernel's global memory; numbers are int32, int64 or float32. Left
out: launch hooks, cooperative launches, clusters, scratch memory, tensor descriptors and auto-tuning.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from tests.ptx.interpreter import Program
from tests.ptx.memory import Region, Traffic
from tests.ptx.parser import PtxError

_SHARED_MEMORY = {80: 166912, 90: 232448}
"""Bytes of shared memory that a CTA may ask for, by compute capability."""

_PACKED = {"i32": "<i", "i64": "<q", "fp32": "<f"}


class Launch(NamedTuple):
    """One launch that has run."""

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    traffic: dict[str, Traffic]
    """Per pointer argument. Memory that two arguments share is counted for the first."""


@functools.cache
def _program(hash: str, file_name: str, entry: str) -> Program:
    """The decoded PTX of a compiled kernel, from Triton's cache of the compilation `hash`."""
    path = get_cache_manager(hash).get_file(f"{file_name}.ptx")
    if path is None:
        raise PtxError(f"{entry}: Triton has not kept its PTX; unset TRITON_STORE_BINARY_ONLY")
    return Program(Path(path).read_text(), entry)


class _Launcher:
    """What Triton calls for a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature, self.metadata = source.signature, metadata
        self.program = _program(metadata.hash, source.name[:150], metadata.name)
        scratch = metadata.global_scratch_size or metadata.profile_scratch_size
        if scratch or metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
            raise PtxError(f"{metadata.name}: scratch memory, clusters and cooperative launches are not supported")

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        machine = driver.active
        assert isinstance(machine, PtxMachine), "a kernel that was compiled for ptx_machine runs inside one only"
        # stream, function, packed metadata, launch metadata and two hooks
        params, regions = self._bind(rest[6:])
        threads = self.metadata.num_warps * self.metadata.warp_size
        self.program.launch((x, y, z), threads, params, regions, self.metadata.shared)
        traffic = {region.name: region.traffic for region in regions}
        machine.launches.append(Launch(self.metadata.name, (x, y, z), self.metadata.num_warps, traffic))

    def _bind(self, args: Sequence[Any]) -> tuple[dict[str, bytes], list[Region]]:
        """The bytes of the PTX parameters and the memory behind the pointers, in the order of the arguments."""
        packed, regions = [], []
        for (name, kind), value in zip(self.signature.items(), args, strict=True):
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                regions.append(_region(name, value))
                packed.append(struct.pack("<Q", value.data_ptr()))
            elif kind in _PACKED:
                packed.append(struct.pack(_PACKED[kind], value))
            else:
                raise PtxError(f"{self.metadata.name}: argument {name} of type {kind} is not supported")
        packed += [bytes(8)] * 2  # global and profile scratch
        sizes = self.program.kernel.params
        if [len(part) for part in packed] != list(sizes.values()):
            raise PtxError(f"{self.metadata.name}: the PTX has parameters {sizes}, the launch {packed}")
        return dict(zip(sizes, packed, strict=True)), regions


def _region(name: str, tensor: torch.Tensor) -> Region:
    """The memory from a tensor's first element to its last, whatever lies between them in a strided view."""
    if tensor.device.type != "cpu":
        raise PtxError(f"{name} is on {tensor.device}; pass CPU tensors")
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Region(name, tensor.data_ptr(), (last + 1) * tensor.element_size() if tensor.numel() else 0)


class PtxMachine(DriverBase):
    """The driver. `launches` grows by one `Launch` per kernel run."""

    def __init__(self, capability: int = 90) -> None:
        if capability not in _SHARED_MEMORY:
            raise ValueError(f"capability is {capability}; use one of {sorted(_SHARED_MEMORY)}")
        self.capability = capability
        self.launches: list[Launch] = []
        self.utils, self.launcher_cls = self, _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return False  # never by itself, only inside ptx_machine

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels per device: one device per capability keeps sm_80 and sm_90 apart
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_MEMORY[device]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        # no module: Triton would unload it through the active driver, which may be gone by then
        return None, None, 0, 0, 1024

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@contextlib.contextmanager
def ptx_machine(capability: int = 90) -> Iterator[PtxMachine]:
    """Make the interpreter Triton's active driver; afterwards the driver is what it was, or undetected again."""
    if knobs.runtime.interpret or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set, so that kernels would never be compiled to PTX; unset it")
    previous, machine = driver._active, PtxMachine(capability)
    driver.set_active(machine)
    try:
        yield machine
    finally:
        driver._active = previous
