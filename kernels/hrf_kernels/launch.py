"""How the Triton kernels are launched: the block plan, one place for launch options, and what Triton can't take.

The plan depends on the size of a sample only, and sampling and training share it: sums are taken in the same order, so
that the log-prob of a replayed step is equal to the bit.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# up to here a sample fits the registers of one program, which then needs no second pass over it; 16384 elements spill,
# and half as many where the size is no multiple of 16, so that each element is masked and addressed by itself
ONE_PROGRAM_LIMIT = 8192
_RAGGED_LIMIT = 4096
# elements of a chunk: so many blocks of so many
_BLOCK, _ITERATIONS = 4096, 2
# offsets have 32 bits, and chunks are CUDA's grid axis y
_LARGEST_SAMPLE = min(2**31 - 2**14, 65_535 * _BLOCK * _ITERATIONS)
# samples of one finalize program
ROWS = 16
# one step's coefficients are elements of a table: their addresses are no multiple of 16, and need not be
UNALIGNED = ["x0_latents", "x0_output", "mean_x0", "mean_latents", "mean_output", "std", "sample_id"]


@dataclass(frozen=True)
class BlockPlan:
    """A sample of `size` elements in `chunks` programs, each of `iterations` blocks of `block` elements."""

    block: int
    iterations: int
    threads: int
    chunks: int

    @property
    def one_program(self) -> bool:
        return self.iterations == 1


def block_plan(size: int, *, one_program: bool | None = None) -> BlockPlan:
    """One program per sample up to 8192 elements (4096 if no multiple of 16), else partial sums of chunks of 8192.

    Args:
        one_program: overrides the choice, for comparing the two.
    """
    if size > _LARGEST_SAMPLE:
        raise ValueError(f"a sample has {size} elements; the Triton kernels take at most {_LARGEST_SAMPLE}")
    if one_program is None:
        one_program = size <= (_RAGGED_LIMIT if size % 16 else ONE_PROGRAM_LIMIT)
    if one_program:
        if size > ONE_PROGRAM_LIMIT:
            raise ValueError(f"a sample has {size} elements; one program takes at most {ONE_PROGRAM_LIMIT}")
        block = max(128, triton.next_power_of_2(size))
        return BlockPlan(block, 1, threads=min(1024, max(64, block // 16)), chunks=1)
    # of the plans with 16 bytes of bf16 a thread the fastest on an H100, at 16×3×256² and at 16×4×64²
    return BlockPlan(_BLOCK, _ITERATIONS, threads=512, chunks=triton.cdiv(size, _BLOCK * _ITERATIONS))


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    *arguments: Any,
    threads: int = 128,
    max_registers: int = 0,
    **meta: Any,
) -> Any:
    """Launch on the tensors' own device. Multiply and add stay separate: fused, the same step has two log-probs.

    Args:
        max_registers: of a thread on NVIDIA, where the compiler aims too low by itself and spills; 0 leaves it to it.

    Returns:
        The compiled kernel; None in the interpreter.
    """
    # asking takes as long as a launch, and on NVIDIA's cards there is one answer
    warp, nvidia = 32, device.type == "cuda" and torch.version.hip is None
    if not nvidia and not triton.knobs.runtime.interpret:
        target = triton.runtime.driver.active.get_current_target()
        warp, nvidia = target.warp_size, target.backend == "cuda"
    if nvidia and max_registers:
        meta["maxnreg"] = max_registers
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        return kernel[grid](*arguments, **meta, num_warps=threads // warp, enable_fp_fusion=False)


_COMPILED: dict[tuple[Any, ...] | None, Any] = {}


def relaunch(
    kernel: Any, grid: tuple[int, int, int], device: torch.device, *arguments: Any, threads: int = 128
) -> None:
    """Launch as `launch` does, but on NVIDIA a second time without Triton's look-ups, most of a launch's time.

    Args:
        arguments: in the kernel's order, its constants at the end.
    """
    key = None
    # for other addresses Triton compiles another kernel, as for other types and numbers
    if remembers(device) and not any(isinstance(value, Tensor) and value.data_ptr() % 16 for value in arguments):
        kinds = [value.dtype if isinstance(value, Tensor) else value for value in arguments]
        key = (kernel.__name__, device.index, threads, *kinds)
    if compiled := _COMPILED.get(key):
        compiled[grid](*arguments)
        return
    compiled = launch(kernel, grid, device, *arguments, threads=threads)
    if key:
        _COMPILED[key] = compiled


def remembers(device: torch.device) -> bool:
    """Whether compiled kernels are launched again as they are: on the current device, if it is NVIDIA's.

    For AMD Triton compiles by the sizes of tensors too.
    """
    return device.type == "cuda" and torch.version.hip is None and device.index == torch.cuda.current_device()


def check_device(device: torch.device) -> None:
    """Refuse tensors that no active Triton driver can reach.

    Raises:
        ValueError: with the way out.
    """
    if triton.knobs.runtime.interpret:
        return
    try:
        active = triton.runtime.driver.active.get_active_torch_device().type
    except RuntimeError:
        active = None
    if active != device.type:
        raise ValueError(
            f'backend="triton" was asked for tensors on {device}, but Triton '
            f'{f"runs on {active}" if active else "finds no GPU"} here; use backend="auto" or "eager", '
            "move the tensors to a GPU, or set TRITON_INTERPRET=1 before starting to debug on the CPU"
        )
