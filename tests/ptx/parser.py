"""PTX text to statements (PTX ISA, "Syntax" and "Directives"), as far as Triton's LLVM back end writes it.

One entry is read, and the shared memory that its launch sizes. Other variables, functions, inline blocks and
statements over several lines are not there: what uses them fails to decode.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

_PARAMETER = re.compile(r"\.param\s+\.[usf](\d+)\b[^,]*?(\w+)\s*(?:,|$)")
_REGISTERS = re.compile(r"\.reg\s+\.(pred|b16|b32|b64)\s+(%\w+)(?:<(\d+)>)?")
_STATEMENT = re.compile(r"(?:([\w$]+):\s*)?(?:(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*))?")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+)\s*)?\]")


class PtxError(RuntimeError):
    """A program that the interpreter refuses; the message names the kernel, the line and what was wrong."""


class UnsupportedInstruction(PtxError):
    """An opcode, modifier, type or operand whose meaning is not written down here."""


class Address(NamedTuple):
    """`[base + offset]`: a register or the name of a parameter, and bytes."""

    base: str
    offset: int


Operand = str | tuple[str, ...] | Address
"""A register, literal or name; a vector `{a, b}`; an address."""


class Statement(NamedTuple):
    line: int
    text: str
    guard: str | None
    """`%p1` or `!%p1`."""
    opcode: str
    operands: tuple[Operand, ...]


@dataclass
class Kernel:
    """One entry: what it declares, and its statements in order."""

    name: str
    params: dict[str, int]
    """Bytes of each parameter, in order."""
    threads: int
    """Threads per CTA."""
    shared: str
    """Name of its shared memory, or nothing."""
    registers: dict[str, np.dtype] = field(default_factory=dict)
    """Unsigned type of each register's bits, bool for a predicate."""
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """Index of the statement that follows the label."""


def parse(text: str, name: str) -> Kernel:
    """The entry `name` of a PTX module."""
    directives = r"\.reqntid (\d+)(?:\s*\.maxnreg \d+)?"
    entry = re.search(rf"\.entry\s+{re.escape(name)}\s*\((.*?)\)\s*{directives}\s*\{{(.*?)^\}}", text, re.S | re.M)
    if not entry:
        raise PtxError(f"the PTX has no entry {name} with a number of threads")
    params = {param: int(bits) // 8 for bits, param in _PARAMETER.findall(entry[1].strip())}
    shared = re.search(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\];", text)
    kernel = Kernel(name, params, int(entry[2]), shared[1] if shared else "")
    for number, line in enumerate(entry[3].split("\n"), 1 + text.count("\n", 0, entry.start(3))):
        line = line.split("//")[0].strip()
        # of debuggers, and hints that change nothing
        if re.match(r"\.(loc|pragma)\s", line):
            continue
        for part in filter(None, (part.strip() for part in line.split(";"))):
            _parse_statement(kernel, part, number)
    return kernel


def _parse_statement(kernel: Kernel, text: str, line: int) -> None:
    if registers := _REGISTERS.fullmatch(text):
        kind, register, count = registers.groups()
        names = [f"{register}{i}" for i in range(int(count))] if count else [register]
        kernel.registers.update(dict.fromkeys(names, np.dtype(bool if kind == "pred" else f"u{int(kind[1:]) // 8}")))
        return
    statement = _STATEMENT.fullmatch(text)
    if not statement:
        raise UnsupportedInstruction(f"{kernel.name}, PTX line {line}: {text}")
    label, guard, opcode, operands = statement.groups()
    if label:
        kernel.labels[label] = len(kernel.statements)
    if opcode:
        text = " ".join(text.split())
        parsed = tuple(_parse_operand(operand) for operand in _OPERAND.findall(operands))
        kernel.statements.append(Statement(line, text, guard, opcode, parsed))


def _parse_operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if address := _ADDRESS.fullmatch(text):
        return Address(address[1], int(address[2] or 0))
    return text
