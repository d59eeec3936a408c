"""What operands mean, and what instructions compute from registers to registers: every known opcode, in full.

The opcodes are what LLVM emits for the project's kernels on sm_80 and sm_90, with their nearest relatives. Fused
multiply-adds are left out on purpose: the kernels are compiled without. NaN payloads are not modelled, except that
conversions to 16-bit floats give the canonical 0x7FFF.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

from tests.ptx.memory import SPECIAL, Batch
from tests.ptx.parser import Kernel, Operand, PtxError, UnsupportedInstruction

TYPES = {
    "pred": np.dtype(bool),
    "f32": np.dtype("f4"),
    **{f"{kind}{8 * size}": np.dtype(f"u{size}") for kind in "bu" for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
}
"""numpy's type of PTX's fundamental types. The 16-bit floats are bits (b16) wherever a value of theirs is."""


Source = Callable[[Batch], Array]
Sink = Callable[[Batch, Array], None]


class Operands:
    """Turns the operands of a kernel's statements into functions of the batch."""

    def __init__(self, kernel: Kernel) -> None:
        self.index = {name: i for i, name in enumerate(kernel.registers)}
        self.registers, self.shared = kernel.registers, kernel.shared

    def guard(self, text: str) -> Source:
        positive = self.source(text.removeprefix("!"), np.dtype(bool))
        return (lambda batch: ~positive(batch)) if text.startswith("!") else positive

    def source(self, text: Operand, dtype: np.dtype, *, relaxed: bool = False) -> Source:
        """The values of an operand; `relaxed` takes the low bits of a wider register ("Operand Size Exceeding …")."""
        if text in self.index:
            index, raw = self._register(text, dtype, relaxed)
            return lambda batch: batch.read(index).astype(raw, copy=False).view(dtype)
        if text in SPECIAL and dtype.itemsize == 4:
            return lambda batch: batch.special[text].view(dtype)
        constant = self._constant(text, dtype)
        return lambda batch: constant

    def sink(self, text: Operand, dtype: np.dtype, *, relaxed: bool = False) -> Sink:
        """Casts values and writes them to a register; `relaxed` extends them to a wider one, by their sign."""
        if text not in self.index:
            raise UnsupportedInstruction(f"destination {text}")
        (index, raw), register = self._register(text, dtype, relaxed), self.registers[text]
        if register != raw:
            return lambda batch, values: batch.write(index, values.astype(dtype, copy=False).astype(register))
        return lambda batch, values: batch.write(index, values.astype(dtype, copy=False).view(register))

    def _register(self, text: str, dtype: np.dtype, relaxed: bool) -> tuple[int, np.dtype]:
        """Index of a register and type of the bits that an operand of `dtype` is."""
        register, raw = self.registers[text], dtype if dtype.kind == "b" else np.dtype(f"u{dtype.itemsize}")
        if register != raw and not (relaxed and register.kind == "u" and register.itemsize > raw.itemsize):
            raise UnsupportedInstruction(f"{text} is not of type {dtype}")
        return self.index[text], raw

    def _constant(self, text: Operand, dtype: np.dtype) -> Array:
        """A literal, or the address of the shared memory, which starts at 0."""
        if text == self.shared and dtype.itemsize == 4:
            bits = 0
        elif isinstance(text, str) and re.fullmatch("0f[0-9A-F]{8}", text) and dtype.itemsize == 4:
            bits = int(text[2:], 16)
        elif isinstance(text, str) and re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", text) and dtype.kind in "iub":
            # of a predicate, every number but 0 is true
            bits = int(text, 0) if dtype.kind != "b" else int(text, 0) != 0
        else:
            raise UnsupportedInstruction(f"operand {text} of type {dtype}")
        return np.array([bits % 2 ** (8 * dtype.itemsize)], f"u{dtype.itemsize}").view(dtype)


class Instruction(NamedTuple):
    """`compute` takes arrays of the arguments' types; what it returns is cast to the result's."""

    result: np.dtype
    arguments: tuple[np.dtype, ...]
    compute: Callable[..., Array]


INSTRUCTIONS: dict[str, Instruction] = {}


def _define(opcode: str, result: str, arguments: str, compute: Callable[..., Array]) -> None:
    INSTRUCTIONS[opcode] = Instruction(TYPES[result], tuple(TYPES[name] for name in arguments.split()), compute)


# --- arithmetic: "Integer Arithmetic Instructions", "Floating-Point Instructions" -------------------------------------

for _type in ("s32", "s64"):
    _define(f"add.{_type}", _type, f"{_type} {_type}", np.add)
    _define(f"sub.{_type}", _type, f"{_type} {_type}", np.subtract)
    _define(f"mul.lo.{_type}", _type, f"{_type} {_type}", np.multiply)
    _define(f"mad.lo.{_type}", _type, f"{_type} {_type} {_type}", lambda a, b, c: a * b + c)
_define("neg.s32", "s32", "s32", np.negative)
_define("min.s32", "s32", "s32 s32", np.minimum)
# towards zero, where numpy's own goes down
_define("div.s32", "s32", "s32 s32", lambda a, b: np.trunc(a / b.astype(np.float64)))
for _kind, _wide in {"s": np.int64, "u": np.uint64}.items():
    _type, _result = f"{_kind}32", f"{_kind}64"
    _define(f"mul.wide.{_type}", _result, f"{_type} {_type}", lambda a, b, wide=_wide: np.multiply(a, b, dtype=wide))
    _define(
        f"mad.wide.{_type}", _result, f"{_type} {_type} {_result}",
        lambda a, b, c, wide=_wide: np.multiply(a, b, dtype=wide) + c,
    )  # fmt: skip
_define("mul.hi.u32", "u32", "u32 u32", lambda a, b: np.multiply(a, b, dtype=np.uint64) >> 32)


def _max(a: Array, b: Array) -> Array:
    """A number wins over NaN, and +0 over −0, which have 0 for their sum."""
    return np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))


# numpy rounds each of these once, to nearest even
_FLOAT = {"add.rn": np.add, "sub.rn": np.subtract, "mul.rn": np.multiply, "div.rn": np.divide, "max": _max}
for _name, _compute in _FLOAT.items():
    _define(f"{_name}.f32", "f32", "f32 f32", _compute)
for _name, _compute in {"neg": np.negative, "abs": np.abs, "sqrt.rn": np.sqrt}.items():
    _define(f"{_name}.f32", "f32", "f32", _compute)
# rounded to nearest here; real hardware may be 2 ulps off
_define("div.full.f32", "f32", "f32 f32", np.divide)
_define("ex2.approx.f32", "f32", "f32", lambda x: np.exp2(x.astype(np.float64)))


# --- bits: "Logic and Shift Instructions" -----------------------------------------------------------------------------


def _extract(a: Array, start: Array, length: Array) -> Array:
    """The bit field, up against the left edge and back down: the right shift brings zeros or its sign."""
    if ((length == 0) | (start.astype(np.uint64) + length > 32)).any():
        raise PtxError("an empty bit field, or one that leaves the register")
    return a << (32 - length - start).astype(a.dtype) >> (32 - length).astype(a.dtype)


for _type in ("pred", "b16", "b32", "b64"):
    for _name, _compute in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
        _define(f"{_name}.{_type}", _type, f"{_type} {_type}", _compute)
for _type in ("pred", "b16", "b32", "b64"):
    _define(f"not.{_type}", _type, _type, np.bitwise_not)
# numpy clamps counts past the width as PTX does: zeros or the sign are left
for _type in ("b32", "b64"):
    _define(f"shl.{_type}", _type, f"{_type} u32", lambda a, count: a << count.astype(a.dtype))
for _type in ("s32", "s64", "u32", "u64"):
    _define(f"shr.{_type}", _type, f"{_type} u32", lambda a, count: a >> count.astype(a.dtype))
for _type in ("s32", "u32"):
    _define(f"bfe.{_type}", _type, f"{_type} u32 u32", _extract)


# --- "Comparison and Selection Instructions", "Data Movement and Conversion Instructions" -----------------------------

_COMPARE = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
for _type in ("s32", "s64", "u32", "u64", "f32"):
    for _name, _compute in _COMPARE.items():
        _define(f"setp.{_name}.{_type}", "pred", f"{_type} {_type}", _compute)
for _type in ("b32", "b64", "f32"):
    _define(f"setp.eq.{_type}", "pred", f"{_type} {_type}", np.equal)
    # of floats the unordered one, true of NaN
    _define(f"setp.ne{'u' * (_type == 'f32')}.{_type}", "pred", f"{_type} {_type}", np.not_equal)
for _type in ("b16", "b32", "b64", "f32"):
    _define(f"selp.{_type}", _type, f"{_type} {_type} pred", lambda a, b, condition: np.where(condition, a, b))
for _type in ("pred", "b16", "b32", "b64", "u16", "u32", "u64"):
    _define(f"mov.{_type}", _type, _type, lambda a: a)
for _type, _half, _bits in (("b32", "b16", 16), ("b64", "b32", 32)):
    # a vector of two halves, the lower first; the names are those of interpreter.py
    _define(f"mov.{_type} low", _half, _type, lambda a: a)
    _define(f"mov.{_type} high", _half, _type, lambda a, bits=_bits: a >> bits)
    _define(
        f"mov.{_type} pack", _type, f"{_half} {_half}",
        lambda low, high, wide=TYPES[_type], bits=_bits: high.astype(wide) << bits | low,
    )  # fmt: skip
for _opcode in ("cvt.s64.s32", "cvt.u64.u32", "cvt.u32.u64", "cvt.u16.u32", "cvt.rn.f32.s32", "cvt.rn.f32.u32"):
    _result, _type = _opcode.split(".")[-2:]
    _define(_opcode, _result, _type, lambda a: a)


def _to_integer(x: Array) -> Array:
    """Towards zero, to the nearest s32 there is, and 0 from NaN."""
    return np.clip(np.nan_to_num(x.astype(np.float64)), -(2**31), 2**31 - 1)


def _to_bf16(x: Array) -> Array:
    bits = x.view(np.uint32)
    return np.where(np.isnan(x), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def _to_f16(x: Array) -> Array:
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


_define("cvt.rzi.s32.f32", "s32", "f32", _to_integer)
_define("cvt.f32.f16", "f32", "b16", lambda bits: bits.view(np.float16))
_define("cvt.f32.bf16", "f32", "b16", lambda bits: (bits.astype(np.uint32) << 16).view(np.float32))
for _name, _to in {"f16": _to_f16, "bf16": _to_bf16}.items():
    _define(f"cvt.rn.{_name}.f32", "b16", "f32", _to)
    # the first operand goes to the upper half
    _define(
        f"cvt.rn.{_name}x2.f32", "b32", "f32 f32",
        lambda upper, lower, to=_to: to(upper).astype(np.uint32) << 16 | to(lower).astype(np.uint32),
    )  # fmt: skip
