"""Reading compiled Triton kernels: registers, spilled bytes, the widths of memory accesses, fused multiply-adds.

NVIDIA: registers and spills as ptxas reports them for the kernel's PTX, the rest from the PTX. AMD: registers and
spills from the assembly's metadata, the rest from the LLVM IR that becomes it, where pointers still have types. An
access is that of an argument: its address is followed back through the code to the pointer it was computed from.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# LLVM IR's scalar types that are not iN or fN
_LLVM_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}


class Access(NamedTuple):
    """One load or store instruction of global memory."""

    argument: str
    bits: int


class Reading(NamedTuple):
    """The parts of a compiled kernel that the rules are about."""

    registers: int
    spilled: int
    """Bytes stored and loaded that the source does not ask for."""
    accesses: list[Access]
    fused: int
    """Multiply-adds that round once where the source rounds twice."""


def read(kernel: Any) -> Reading:
    """Read a triton.compiler.CompiledKernel.

    Raises:
        RuntimeError: the tools don't agree with Triton about its own kernel, or an address can't be followed.
    """
    arguments = [name for name, kind in kernel.src.signature.items() if kind != "constexpr"]
    pointers = {name for name in arguments if kernel.src.signature[name].startswith("*")}
    if "ptx" in kernel.asm:
        ptx = kernel.asm["ptx"]
        accesses = _named(_ptx_accesses(ptx), arguments, pointers)
        return Reading(*_ptxas(kernel), accesses, len(re.findall(r"\b(?:fma|mad)\.[\w.]*f(?:16|32|64)", ptx)))
    code, ir = kernel.asm["amdgcn"], kernel.asm["llir"]
    accesses = _named(_llvm_accesses(ir), arguments, pointers)
    wide = len(re.findall(r"\b(?:buffer|global)_(?:load|store)_dwordx4\b", code))
    if wide < sum(access.bits >= 128 for access in accesses):
        raise RuntimeError(f"{kernel.metadata.name}: the assembly splits 128-bit accesses of its LLVM IR")
    fused = len(re.findall(r"@llvm\.fm(?:a|uladd)\b|\bcontract\b", ir))
    return Reading(*_amd_registers(code), accesses, fused)


def _ptxas(kernel: Any) -> tuple[int, int]:
    """(registers, spilled bytes) as ptxas says when it compiles the PTX again, in the way that Triton does."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        ptx, ours, theirs = (Path(folder) / name for name in ("k.ptx", "ours.cubin", "theirs.cubin"))
        ptx.write_text(kernel.asm["ptx"])
        theirs.write_bytes(kernel.asm["cubin"])
        architecture = _one(r"^\.target (\w+)", kernel.asm["ptx"], kernel)
        command = [get_ptxas(kernel.metadata.target.arch).path, "-v", "--fmad=false", "--regAllocOptLevel=2"]
        log = _run([*command, f"--gpu-name={architecture}", str(ptx), "-o", str(ours)])
        usage = _run([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(theirs)])
    registers = int(_one(r"Used (\d+) registers", log, kernel))
    if registers != int(_one(r"\bREG:(\d+)", usage, kernel)):
        raise RuntimeError(f"{kernel.metadata.name}: ptxas {log!r} disagrees with Triton's cubin {usage!r}")
    stores, loads = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return registers, int(stores) + int(loads)


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout + result.stderr


def _one(pattern: str, text: str, kernel: Any) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"{kernel.metadata.name}: nothing like {pattern!r} in {text[:500]!r}")
    return match[1]


def _amd_registers(code: str) -> tuple[int, int]:
    """(vector registers, spilled bytes per lane); a scalar register spills into a lane of a vector register."""
    number = {key: int(value) for key, value in re.findall(r"^\s*(?:- )?\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
    spilled = 4 * (number["vgpr_spill_count"] + number["sgpr_spill_count"])
    return number["vgpr_count"], max(spilled, number["private_segment_fixed_size"])


def _ptx_accesses(ptx: str) -> Iterator[tuple[set[int], int]]:
    """(positions of the parameters that the address comes from, bits) of every load and store of global memory."""
    sources: dict[str, set[str | int]] = defaultdict(set)
    accesses = []
    for line in ptx.splitlines():
        access = re.search(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[busf](\d+)\s.*\[\s*(%rd\d+)", line)
        if access:
            accesses.append((access[3], int(access[1] or 1) * int(access[2])))
            continue
        made = re.match(r"\s*(?:@!?%p\d+ )?[a-z][\w.:]*\s+(%rd\d+),(.*)", line)
        if made:
            words = re.findall(r"%rd\d+|_param_(\d+)\]", made[2]), re.findall(r"%rd\d+", made[2])
            sources[made[1]] |= {int(position) for position in words[0] if position} | set(words[1])
    return ((_roots([register], sources), bits) for register, bits in accesses)


def _llvm_accesses(ir: str) -> Iterator[tuple[set[int], int]]:
    """Positions and bits as in `_ptx_accesses`, from LLVM IR, where an address and its origin are of type ptr."""
    body = re.search(r"^define .*?\((.*)\).*?\{\n(.*?)^\}", ir, re.MULTILINE | re.DOTALL)
    if body is None:
        raise RuntimeError("the LLVM IR defines no kernel")
    sources: dict[str, set[str | int]] = {f"%{i}": {i} for i in range(body[1].count("%"))}
    accesses = []
    for line in body[2].splitlines():
        pointers = re.findall(r"\bptr addrspace\([178]\) (%\d+)", line)
        access = re.search(r"\b(?:load|store) (?:<(\d+) x )?(\w+)|\.buffer\.(?:load|store)\.(?:v(\d+))?(\w+)\(", line)
        if access and pointers:
            bits = int(access[1] or access[3] or 1) * _llvm_bits(access[2] or access[4])
            accesses.append((pointers[-1], bits))
        elif pointers or " phi ptr" in line:
            target, *rest = re.findall(r"%\d+", line)
            sources.setdefault(target, set()).update(pointers or rest)
    return ((_roots([register], sources), bits) for register, bits in accesses)


def _llvm_bits(kind: str) -> int:
    return _LLVM_BITS[kind] if kind in _LLVM_BITS else int(re.sub(r"\D", "", kind))


def _roots(pending: list[str], sources: dict[str, set[str | int]]) -> set[int]:
    """Parameters that a register is computed from."""
    seen: set[str | int] = set()
    while pending:
        for source in sources.get(pending.pop(), set()) - seen:
            seen.add(source)
            if isinstance(source, str):
                pending.append(source)
    return {source for source in seen if isinstance(source, int)}


def _named(found: Iterable[tuple[set[int], int]], arguments: list[str], pointers: set[str]) -> list[Access]:
    """Accesses by the name of the one pointer argument that each address comes from."""
    accesses = []
    for positions, bits in found:
        names = {arguments[i] for i in positions if i < len(arguments)} & pointers
        if len(names) != 1:
            raise RuntimeError(f"an address is computed from {sorted(names) or 'no argument'}, not from one argument")
        accesses.append(Access(names.pop(), bits))
    return accesses
