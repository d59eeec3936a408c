"""PTX text to statements (PTX ISA, "Syntax" and "Directives"), as far as Triton's LLVM back end writes it.

One entry is read; functions, calls and debug sections are not. Names declared in an inline-asm block `{ … }` are
renamed, so that the statements of an entry form one flat list.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_TOKEN = re.compile(
    r"\s*(?:(?P<debug>\.(?:loc|file|section)\b[^\n]*)|(?P<brace>[{}])|(?P<label>[\w$]+)\s*:(?!:)|(?P<statement>[^;{}][^;]*);)"
)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s](?:[^,{\[]*[^,\s{\[])?")
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_VARIABLE = re.compile(
    r"\.(shared|global|local|const)\s+(?:\.align\s+(\d+)\s+)?\.[busf](\d+)\s+([\w$]+)\[(\d*)\]\s*(?:=\s*\{([^}]*)\})?\s*;"
)


class PtxError(RuntimeError):
    """A program that the interpreter refuses; the message names the kernel, the line and what was wrong."""


class UnsupportedInstruction(PtxError):
    """An opcode, modifier, type or directive whose meaning is not written down here."""


class Address(NamedTuple):
    """`[base + offset]`: a register or the name of a variable, and bytes."""

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


class Variable(NamedTuple):
    """A named array in a state space; `data` are the bytes of an initialised one."""

    space: str
    offset: int
    size: int
    data: np.ndarray | None


@dataclass
class Kernel:
    """One entry: what it declares, and its statements in order."""

    name: str
    params: dict[str, int] = field(default_factory=dict)
    """Bytes of each parameter, in order."""
    threads: int | None = None
    """Threads per CTA that .reqntid or .maxntid states."""
    registers: dict[str, np.dtype] = field(default_factory=dict)
    """Unsigned type of each register's bits, bool for a predicate."""
    variables: dict[str, Variable] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """Index of the statement that follows the label."""


def parse(text: str, name: str) -> Kernel:
    """The entry `name` of a PTX module."""
    text = _COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text)
    entry = re.search(rf"\.entry\s+{re.escape(name)}\s*\((.*?)\)(.*?)\{{", text, re.S)
    if not entry:
        raise PtxError(f"the PTX has no entry {name}")
    kernel = Kernel(name, params=_parse_params(entry[1]), variables=_parse_variables(text))
    if threads := re.search(r"\.(?:reqntid|maxntid)\s+([\d, ]+)", entry[2]):
        kernel.threads = int(np.prod([int(count) for count in threads[1].split(",")]))
    kernel.registers["%cc"] = np.dtype(bool)  # the carry flag of the extended-precision instructions
    newlines = [match.start() for match in re.finditer("\n", text)]
    position, scopes = entry.end(), [{}]
    while scopes:
        token = _TOKEN.match(text, position)
        if not token:
            raise PtxError(f"{name}: cannot read the PTX at {text[position : position + 60]!r}")
        position = token.end()
        if token["brace"] == "{":
            scopes.append(dict(scopes[-1]))
        elif token["brace"]:
            scopes.pop()
        elif token["label"]:
            kernel.labels[token["label"]] = len(kernel.statements)
        elif token["statement"]:
            line = bisect.bisect(newlines, token.start("statement")) + 1
            _parse_statement(kernel, token["statement"], line, scopes)
    return kernel


def _parse_params(text: str) -> dict[str, int]:
    params = {}
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        width, name, count = re.search(r"\.[busf](\d+)\b.*?([\w$]+)(?:\[(\d+)\])?$", declaration, re.S).groups()
        params[name] = int(width) // 8 * int(count or 1)
    return params


def _parse_variables(text: str) -> dict[str, Variable]:
    """Arrays of the module and of its bodies; the unsized .extern one comes after the others of its space."""
    variables: dict[str, Variable] = {}
    used: dict[str, int] = {}
    found = sorted(_VARIABLE.findall(text), key=lambda groups: groups[4] == "")
    for space, align, width, name, count, values in found:
        align, width = int(align or 1), int(width)
        offset = -(-used.get(space, 0) // align) * align
        size = int(count or 0) * width // 8
        used[space] = offset + size
        data = None
        if values:
            data = np.zeros(-(-size // 16) * 2, np.uint64).view(f"u{width // 8}")
            numbers = [int(value, 0) for value in values.split(",")]
            data[: len(numbers)] = numbers
        variables[name] = Variable(space, offset, size, data)
    return variables


def _parse_statement(kernel: Kernel, text: str, line: int, scopes: list[dict[str, str]]) -> None:
    text = " ".join(text.split())
    if text.startswith(".reg"):
        _declare_registers(kernel, text, scopes)
        return
    if text.startswith((".pragma", ".local", ".shared")):  # a hint to ptxas; the variables were read before
        return
    names = scopes[-1]
    renamed = re.sub(r"[%\w$]+", lambda match: names.get(match[0], match[0]), text) if names else text
    match = re.fullmatch(r"(?:@(!?[%\w$#]+)\s+)?([a-z][\w.:]*)\s*(.*)", renamed)
    if not match:
        raise UnsupportedInstruction(f"{kernel.name}, PTX line {line}: {text}")
    operands = tuple(_parse_operand(operand) for operand in _OPERAND.findall(match[3]))
    kernel.statements.append(Statement(line, text, match[1], match[2], operands))


def _declare_registers(kernel: Kernel, text: str, scopes: list[dict[str, str]]) -> None:
    kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()
    if not re.fullmatch(r"pred|b?[busf](8|16|32|64)", kind):
        raise UnsupportedInstruction(f"{kernel.name}: register type in {text}")
    dtype = np.dtype(bool if kind == "pred" else f"u{int(re.sub('[^0-9]', '', kind)) // 8}")
    for name in names.replace(" ", "").split(","):
        if ranged := re.fullmatch(r"(.+)<(\d+)>", name):
            kernel.registers.update({f"{ranged[1]}{i}": dtype for i in range(int(ranged[2]))})
        elif len(scopes) > 1:
            scopes[-1][name] = f"{name}#{len(kernel.registers)}"
            kernel.registers[scopes[-1][name]] = dtype
        else:
            kernel.registers[name] = dtype


def _parse_operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        address = _ADDRESS.fullmatch(text)
        if not address:
            raise UnsupportedInstruction(f"address {text}")
        return Address(address[1], int(address[2] or "0", 0))
    return text
