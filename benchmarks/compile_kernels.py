"""Compile every Triton kernel for four GPUs on a machine that has none, and hold the code to its rules.

    python benchmarks/compile_kernels.py                              # the table; exit code 1 if a rule is broken
    python benchmarks/compile_kernels.py --write kernels/README.md    # and put it between the markers there

The public functions are called with backend="triton" on small CPU tensors under a Triton driver that compiles and does
not run, so what is read is what a GPU would get: the same launch options, the same specialisation. Nothing is timed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

if __name__ == "__main__":
    # instead of this folder, whose modules would hide packages of their names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.kernel_bench.assembly import Reading, read
from benchmarks.kernel_bench.compile_only import collect
from benchmarks.tables import markdown_table, write_between
from hrf_kernels import StepCoefficients, clipped_surrogate, gaussian_log_prob, gaussian_step, norm_kernels
from hrf_kernels.norm import group_norm
from hrf_kernels.step import step_kernel
from hrf_kernels.surrogate import finalize_kernel, gradient_kernel, one_program_kernel, scale_kernel, sums_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# aligned is a multiple of 16 elements, which Triton compiles for; the second of each is the largest of one program
ALIGNED = ((3, 32, 32), (2, 64, 64), (3, 256, 256))
RAGGED = ((3, 33, 33), (1, 90, 91), (3, 101, 101))
# the plainest kernels, and those with every option at once
OPTIONS = ("plain", "all")
KERNELS = (step_kernel, sums_kernel, finalize_kernel, one_program_kernel, gradient_kernel, scale_kernel)
# channels, height and width, and groups: whole blocks, channels that are no multiple of 16, a group of many
ALIGNED_NORM, RAGGED_NORM, ONE_GROUP = ((128, 64, 64), 32), ((24, 33, 33), 3), ((1024, 64, 64), 1)
NORM_KERNELS = (
    *(norm_kernels.moments_kernel, norm_kernels.group_moments_kernel, norm_kernels.normalise_kernel),
    *(norm_kernels.gradient_sums_kernel, norm_kernels.group_sums_kernel, norm_kernels.input_gradient_kernel),
)
SAMPLES = {
    *("model_output", "unconditional", "reference", "latents", "next_latents"),
    *("gradient", "unconditional_gradient", "inputs", "output", "result"),
}
MAX_REGISTERS = 128
MARKERS = ("<!-- compile matrix: begin -->", "<!-- compile matrix: end -->")


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    target: str
    dtype: str
    shape: tuple[int, ...]
    options: str
    kernel: str
    """Its name, and its plan where it has two: one program per sample, or one per chunk of it."""
    reading: Reading

    @property
    def aligned(self) -> bool:
        return self.shape in (*ALIGNED, ALIGNED_NORM[0], ONE_GROUP[0])

    @property
    def narrowest(self) -> int | None:
        """Bits of the narrowest access of a tensor as large as the samples; None for a kernel without one."""
        return min((access.bits for access in self.reading.accesses if access.argument in SAMPLES), default=None)

    def faults(self) -> list[str]:
        """The broken rules, each a sentence."""
        code, limit = self.reading, MAX_REGISTERS
        rules = {
            f"spills {code.spilled} bytes": code.spilled > 0,
            f"has {code.fused} fused multiply-adds": code.fused > 0,
            f"takes {code.registers} registers, more than {limit}": self.aligned and code.registers > limit,
            f"has a sample-sized access of {self.narrowest} bits": self.aligned and (self.narrowest or 128) < 128,
        }
        where = f"{self.kernel} on {self.target}, {self.dtype} {'×'.join(map(str, self.shape))}, options {self.options}"
        return [f"{where}: {rule}" for rule, broken in rules.items() if broken]


def launch_all(shape: tuple[int, ...], dtype: torch.dtype, options: str) -> None:
    """Every public function, forward and backward, on two samples; what they return is not computed."""
    batch = 2
    every = options == "all"

    def samples(kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(batch, *shape, dtype=kind)

    coef = StepCoefficients(*torch.full((6, batch) if every else (6,), 0.5), x0_clip=1.0 if every else None)
    guided: dict[str, Any] = {"unconditional_output": samples(dtype), "guidance_scale": 2.0} if every else {}
    row, latents, kind = torch.zeros(batch), samples(), {"backend": "triton"}
    anchored: dict[str, Any] = {"reference_output": samples(dtype), "kl_weight": row} if every else {}
    gaussian_step(samples(dtype), latents, coef, seed=1, sample_id=torch.arange(batch), step=0, **guided, **kind)
    output = samples(dtype).requires_grad_()
    gaussian_log_prob(output, latents, samples(), coef, **guided, **kind).sum().backward()
    clip_range = row if every else 0.1
    surrogate = clipped_surrogate(output, latents, samples(), coef, row, row, clip_range, **guided, **anchored, **kind)
    surrogate.loss.sum().backward()


def launch_norm(shape: tuple[int, ...], groups: int, dtype: torch.dtype, options: str) -> None:
    """A group norm of two samples, forward and backward; with all options SiLU behind it."""
    inputs = torch.zeros(2, *shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = torch.ones(2, shape[0], requires_grad=True)
    group_norm(inputs, weights[0], weights[1], groups, silu=options == "all").sum().backward()


def matrix(
    targets: Iterable[str] = TARGETS,
    *,
    dtypes: Iterable[str] = DTYPES,
    shapes: Iterable[tuple[int, ...]] = ALIGNED + RAGGED,
    norms: Iterable[tuple[tuple[int, ...], int]] = (ALIGNED_NORM, RAGGED_NORM, ONE_GROUP),
    options: Iterable[str] = OPTIONS,
    progress: bool = False,
) -> list[Row]:
    """One row per kernel of every combination.

    Raises:
        ValueError: an unknown target or dtype, or Triton is interpreting.
    """
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, so nothing would be compiled; unset it")
    for names, known in ((targets := list(targets), TARGETS), (dtypes := list(dtypes), DTYPES)):
        for name in names:
            if name not in known:
                raise ValueError(f"{name!r} is not known; use one of {', '.join(known)}")
    rows = []
    cases = list(itertools.product(targets, dtypes, [*((shape, 0) for shape in shapes), *norms], options))
    for target, dtype, (shape, groups), choice in tqdm(cases, unit="case", disable=not progress):
        with collect(TARGETS[target], NORM_KERNELS if groups else KERNELS) as compiled:
            if groups:
                launch_norm(shape, groups, DTYPES[dtype], choice)
            else:
                launch_all(shape, DTYPES[dtype], choice)
        rows += [Row(target, dtype, shape, choice, _name(kernel), read(kernel)) for kernel in compiled]
    return rows


def _name(kernel: Any) -> str:
    name = kernel.metadata.name.removesuffix("_kernel")
    constants = {kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
    if name not in ("step", "sums"):
        return name
    return f"{name}, {'one program' if constants['ITERATIONS'] == 1 else 'chunks'}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: registers per thread, spills, fusion and widths; the worst of aligned sizes / of ragged ones."""
    targets = list(dict.fromkeys(row.target for row in rows))
    lines: list[list[str]] = []

    def add(title: str, chosen: Sequence[Row], value: Callable[[Row], int | None], worst: Any = max) -> None:
        cells = []
        for target in targets:
            of_target = [(row.aligned, value(row)) for row in chosen if row.target == target]
            pair = [[v for aligned, v in of_target if aligned == wanted and v is not None] for wanted in (True, False)]
            cells.append(" / ".join(str(worst(values)) if values else "-" for values in pair))
        lines.append([title, *cells])

    for kernel, dtype in sorted({(row.kernel, row.dtype) for row in rows}, key=lambda key: (key[0], key[1] == "bf16")):
        chosen = [row for row in rows if (row.kernel, row.dtype) == (kernel, dtype)]
        add(f"{kernel}; {dtype}", chosen, lambda row: row.reading.registers)
    add("all: spilled bytes", rows, lambda row: row.reading.spilled)
    add("all: fused multiply-adds", rows, lambda row: row.reading.fused)
    add("all: narrowest access of a sample, bits", rows, lambda row: row.narrowest, min)
    note = "Registers per thread, worst of aligned / of ragged sizes;"
    note += f" {len(rows)} kernels, Triton {triton.__version__}."
    return f"{markdown_table(['kernel; model output', *targets], lines)}\n\n{note}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of this file")
    arguments = parser.parse_args(words)
    rows = matrix(arguments.targets, progress=True)
    text = table(rows)
    print(text)
    if arguments.write:
        write_between(arguments.write, MARKERS, text)
    faults = [fault for row in rows for fault in row.faults()]
    for fault in faults:
        print(f"broken: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
