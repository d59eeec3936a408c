"""Bits: "Logic and Shift Instructions", bit fields, byte permutes and counts."""

from __future__ import annotations

import numpy as np
from numpy import ndarray as Array

from tests.ptx.opcodes import B32, U32, Opcode, Operation, operation


@operation("and", "or", "xor", "not")
def _logic(opcode: Opcode) -> Operation:
    format = opcode.format("bp")
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[opcode.root]
    return Operation((format,), (format,) * function.nin, function)


def _shift(a: Array, count: Array, left: bool) -> Array:
    """Counts past the width are clamped to it: "Logic and Shift Instructions"."""
    width = a.dtype.itemsize * 8
    beyond = count >= width
    shift = np.left_shift if left else np.right_shift
    if not beyond.any():
        return shift(a, count.astype(a.dtype))
    inside = shift(a, np.where(beyond, width - 1, count).astype(a.dtype))
    # a right shift by width − 1 has already left nothing but the sign
    return np.where(beyond, 0 if left or a.dtype.kind == "u" else inside, inside).astype(a.dtype)


@operation("shl", "shr")
def _shifts(opcode: Opcode) -> Operation:
    left = opcode.root == "shl"
    format = opcode.format("b" if left else "usb")
    return Operation((format,), (format, U32), lambda a, count: _shift(a, count, left))


@operation("shf")
def _funnel_shift(opcode: Opcode) -> Operation:
    opcode.format("b", (32,))
    left, wrap = opcode.one_of("l", "r") == "l", opcode.one_of("wrap", "clamp") == "wrap"

    def compute(low: Array, high: Array, count: Array) -> Array:
        both = high.astype(np.uint64) << 32 | low
        count = (count & 31 if wrap else np.minimum(count, 32)).astype(np.uint64)
        return (both << count >> 32 if left else both >> count).astype(np.uint32)

    return Operation((B32,), (B32, B32, U32), compute)


@operation("lop3")
def _lop3(opcode: Opcode) -> Operation:
    opcode.format("b", (32,))

    def compute(a: Array, b: Array, c: Array, table: Array) -> Array:
        chosen = (i for i in range(8) if table[0] >> i & 1)
        terms = ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in chosen)
        return sum(terms, np.zeros(1, np.uint32))

    return Operation((B32,), (B32, B32, B32, U32), compute)


@operation("prmt")
def _permute(opcode: Opcode) -> Operation:
    opcode.format("b", (32,))

    def compute(a: Array, b: Array, control: Array) -> Array:
        both, result = b.astype(np.uint64) << 32 | a, np.zeros(1, np.uint32)
        for i in range(4):
            selector = control >> 4 * i & 0xF
            byte = (both >> (selector & 7).astype(np.uint64) * 8 & 0xFF).astype(np.uint32)
            sign = np.where(byte & 0x80, 0xFF, 0).astype(np.uint32)
            result = result | np.where(selector & 8, sign, byte) << 8 * i
        return result

    return Operation((B32,), (B32, B32, U32), compute)


@operation("bfe")
def _extract(opcode: Opcode) -> Operation:
    format = opcode.format("us", (32, 64))

    def compute(a: Array, start: Array, length: Array) -> Array:
        start, length = start & 0xFF, length & 0xFF
        # up against the left edge, then back down: the right shift brings zeros, or the sign of the field or of a
        field = np.minimum(length, np.where(start < format.bits, format.bits - start, 0))
        left = _shift(a, (format.bits - field - np.minimum(start, format.bits)).astype(np.uint32), True)
        value = _shift(left, (format.bits - field).astype(np.uint32), False)
        return np.where(length == 0, 0, value).astype(a.dtype)

    return Operation((format,), (format, U32, U32), compute)


@operation("bfi")
def _insert(opcode: Opcode) -> Operation:
    format = opcode.format("b", (32, 64))

    def compute(a: Array, b: Array, start: Array, length: Array) -> Array:
        start, length = start & 0xFF, length & 0xFF
        mask = _shift(~_shift(np.full_like(a, 2**format.bits - 1), length, True), start, True)
        return b & ~mask | _shift(a, start, True) & mask

    return Operation((format,), (format, format, U32, U32), compute)


@operation("popc", "clz", "brev")
def _count(opcode: Opcode) -> Operation:
    format = opcode.format("b", (32, 64))

    def bits(a: Array) -> Array:
        """[threads, bits], the highest first."""
        return np.unpackbits(a.astype(a.dtype.newbyteorder(">")).view(np.uint8).reshape(len(a), -1), axis=1)

    if opcode.root == "popc":
        return Operation((U32,), (format,), lambda a: np.bitwise_count(a).astype(np.uint32))
    if opcode.root == "brev":
        reverse = lambda a: np.packbits(bits(a), axis=1, bitorder="little")[:, ::-1]  # noqa: E731
        big = format.raw.newbyteorder(">")
        return Operation(
            (format,), (format,), lambda a: np.ascontiguousarray(reverse(a)).view(big).reshape(-1).astype(format.raw)
        )
    return Operation((U32,), (format,), lambda a: np.where(a == 0, format.bits, bits(a).argmax(1)).astype(np.uint32))
