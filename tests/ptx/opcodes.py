"""Opcodes: how an instruction's text becomes a function of numpy arrays, and the register of those functions.

The families are arithmetic.py, logic.py and conversion.py. An opcode, modifier or type that none of them asks for
raises. Memory, shuffles and control flow are in interpreter.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

from tests.ptx.formats import FORMATS, Format, flush
from tests.ptx.parser import UnsupportedInstruction

B32, B64, U32, U64, PRED = (FORMATS[name] for name in ("b32", "b64", "u32", "u64", "pred"))


class Operation(NamedTuple):
    """`compute` takes decoded arguments and returns the decoded result, or a tuple where there are more."""

    results: tuple[Format, ...]
    arguments: tuple[Format, ...]
    compute: Callable[..., Array | tuple[Array, ...]]


class Opcode:
    """An opcode taken apart: every modifier has to be asked for, and `finish` refuses what nobody asked for."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.root, *self.modifiers = text.split(".")

    def has(self, name: str) -> bool:
        found = name in self.modifiers
        if found:
            self.modifiers.remove(name)
        return found

    def one_of(self, *names: str, default: str | None = None) -> str:
        """The one modifier among `names`; without a default there must be one."""
        found = next((name for name in names if self.has(name)), default)
        if found is None:
            self.refuse(f"needs one of .{', .'.join(names)}")
        return found

    def format(self, kinds: str = "usbf", bits: tuple[int, ...] = (16, 32, 64)) -> Format:
        """The type, which is the last modifier."""
        format = FORMATS.get(self.modifiers.pop() if self.modifiers else "")
        if format is None or format.kind not in kinds or (format.kind != "p" and format.bits not in bits):
            self.refuse("the type")
        return format

    def finish(self) -> None:
        if self.modifiers:
            self.refuse(f"modifier .{self.modifiers[0]}")

    def refuse(self, what: str) -> None:
        raise UnsupportedInstruction(f"{self.text} is not supported: {what}")


OPERATIONS: dict[str, Callable[[Opcode], Operation]] = {}


def operation(*roots: str) -> Callable:
    def register(function: Callable[[Opcode], Operation]) -> Callable[[Opcode], Operation]:
        OPERATIONS.update(dict.fromkeys(roots, function))
        return function

    return register


def decode(text: str) -> Operation:
    """The operation of an opcode such as `fma.rn.f32`."""
    opcode = Opcode(text)
    if opcode.root not in OPERATIONS:
        opcode.refuse("the opcode")
    result = OPERATIONS[opcode.root](opcode)
    opcode.finish()
    return result


def flushing(opcode: Opcode, format: Format, compute: Callable) -> Callable:
    """`compute` with subnormal inputs and results flushed where the opcode says .ftz (float32 only)."""
    if not opcode.has("ftz"):
        return compute
    if format.name != "f32":
        opcode.refuse("modifier .ftz of this type")
    return lambda *values: flush(compute(*[flush(x) if x.dtype == np.float32 else x for x in values]))
