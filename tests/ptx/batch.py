"""The state of the threads that run together, one numpy array per register, and what a statement's operands mean."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

from tests.ptx.formats import Format
from tests.ptx.memory import WARP, GlobalMemory, OwnedMemory
from tests.ptx.opcodes import PRED
from tests.ptx.parser import Kernel, Operand, PtxError, UnsupportedInstruction

SPECIAL = (
    *("%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z"),
    *("%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%nwarpid"),
)
"""Read-only registers; blocks have one dimension, as Triton's do."""


class UninitialisedRegister(PtxError):
    """A register is read by a thread that has not written it."""


class Batch:
    """The state of the threads that run together. Register arrays are replaced, never written in place."""

    def __init__(self, registers: int, ctas: Array, grid: tuple[int, int, int], threads: int) -> None:
        self.count, self.threads = len(ctas) * threads, threads
        self.registers: list[Array | None] = [None] * registers
        self.partial: dict[int, Array] = {}
        """Which threads have written a register that not all have."""
        self.active: Array | None = None
        """[count] bool; None when every thread is."""
        self.everyone = np.arange(self.count)
        thread, cta = np.tile(np.arange(threads), len(ctas)), np.repeat(ctas, threads)
        x, y, z = grid
        values = {
            "%tid.x": thread,
            **{"%tid.y": 0, "%tid.z": 0, "%ntid.x": threads, "%ntid.y": 1, "%ntid.z": 1},
            **{"%ctaid.x": cta % x, "%ctaid.y": cta // x % y, "%ctaid.z": cta // (x * y)},
            **{"%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": z},
            **{"%laneid": thread % WARP, "%warpid": thread // WARP, "%nwarpid": -(-threads // WARP)},
        }
        self.special = {name: np.atleast_1d(values[name]).astype(np.uint32) for name in SPECIAL}
        self.params: dict[str, bytes] = {}
        self.spaces: dict[str, GlobalMemory | OwnedMemory] = {}

    def read(self, index: int) -> Array:
        raw = self.registers[index]
        if raw is None:
            raise UninitialisedRegister("a source was never written")
        if self.partial and index in self.partial:
            missing = ~self.partial[index] if self.active is None else self.active & ~self.partial[index]
            if missing.any():
                raise UninitialisedRegister(f"a source was not written by thread {missing.argmax() % self.threads}")
        return raw

    def write(self, index: int, raw: Array) -> None:
        old = self.registers[index]
        if self.active is None:
            self.partial.pop(index, None)
        elif old is None:
            self.partial[index] = self.active
        else:
            if index in self.partial:
                self.partial[index] = self.partial[index] | self.active
            raw = np.where(self.active, raw, old)
        self.registers[index] = raw

    def lanes(self) -> Array:
        return self.everyone if self.active is None else np.flatnonzero(self.active)


Source = Callable[[Batch], Array]
Sink = Callable[[Batch, Array], None]


class Operands:
    """Turns the operands of a kernel's statements into functions of the batch."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int]) -> None:
        self.index = {name: i for i, name in enumerate(kernel.registers)}
        self.dtypes = list(kernel.registers.values())
        self.params, self.symbols = kernel.params, symbols

    def dtype(self, register: str) -> np.dtype:
        return self.dtypes[self.index[register]]

    def source(self, text: Operand, format: Format, *, relaxed: bool = False) -> Source:
        """The decoded values of an operand; `relaxed` takes the low bits of a wider register ("Operand Size")."""
        if not isinstance(text, str):
            raise UnsupportedInstruction(f"operand {text}")
        if format is PRED and text.startswith("!"):
            positive = self.source(text[1:], PRED)
            return lambda batch: ~positive(batch)
        decode_value = format.decode
        if text in self.index:
            index, dtype = self.index[text], self.dtypes[self.index[text]]
            if dtype == format.raw:
                return lambda batch: decode_value(batch.read(index))
            self._check_wider(text, dtype, format, relaxed)
            return lambda batch: decode_value(batch.read(index).astype(format.raw))
        if text.startswith("%"):
            if text not in SPECIAL:
                raise UnsupportedInstruction(f"register {text}")
            return lambda batch: decode_value(batch.special[text].astype(format.raw, copy=False))
        constant = format.decode(self._constant(text, format))
        return lambda batch: constant

    def _constant(self, text: str, format: Format) -> Array:
        """The bits of a literal or of a variable's address; "Constants"."""
        mask = 2 ** (8 * format.raw.itemsize) - 1
        if text in self.symbols:
            return np.array([self.symbols[text] & mask], format.raw)
        kind, digits = text[:2].lower(), text[2:]
        if kind in ("0f", "0d"):
            if format.bits != (32 if kind == "0f" else 64):
                raise UnsupportedInstruction(f"literal {text} of {format.bits} bits")
            return np.array([int(digits, 16)], format.raw)
        try:
            if format.kind == "f" and "." in text:
                return format.encode(np.array([float(text)], np.float64))
            number = int(text.rstrip("Uu"), 0)
        except ValueError:
            raise UnsupportedInstruction(f"operand {text}") from None
        if format is PRED or format.kind == "f" and not text.startswith("0x"):
            raise UnsupportedInstruction(f"literal {text} of type {format.name}")
        return np.array([number & mask], format.raw)

    def sink(self, text: Operand, format: Format, *, relaxed: bool = False) -> Sink:
        """Writes values to a register; `relaxed` extends them to a wider one."""
        if text == "_":
            return lambda batch, values: None
        if text not in self.index:
            raise UnsupportedInstruction(f"destination {text}")
        index, dtype, encode = self.index[text], self.dtypes[self.index[text]], format.encode
        if dtype == format.raw:
            return lambda batch, values: batch.write(index, encode(values))
        self._check_wider(text, dtype, format, relaxed)
        # a wider register is filled by the sign of a signed type, by zeros otherwise
        signed = "i" if format.kind == "s" else "u"
        narrow, wide = f"{signed}{format.raw.itemsize}", f"{signed}{dtype.itemsize}"
        return lambda batch, values: batch.write(index, encode(values).view(narrow).astype(wide).view(dtype))

    def _check_wider(self, text: str, dtype: np.dtype, format: Format, relaxed: bool) -> None:
        if not relaxed or PRED.raw in (dtype, format.raw) or dtype.itemsize < format.raw.itemsize:
            raise UnsupportedInstruction(f"{text} is not of {format.bits} bits")
