"""Arithmetic: "Integer Arithmetic", "Floating Point" and "Extended-Precision" instructions, exact where IEEE is.

The `.approx` and `.full` functions are computed in float64 and rounded to nearest; real hardware may differ there by
the ulps that the ISA documents.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

from tests.ptx.formats import FORMATS, Format, fma32, fma64, round_to_odd
from tests.ptx.opcodes import PRED, U32, Opcode, Operation, flushing, operation

_FLOAT = {
    "f32": {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma32},
    "f64": {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma64},
}
# float64 holds every product of two halves exactly
_HALF = {
    "add": round_to_odd,
    "sub": lambda a, b: round_to_odd(a, -b),
    "mul": np.multiply,
    "fma": lambda a, b, c: round_to_odd(a * b, c),
}


def _multiply_high64(a: Array, b: Array) -> Array:
    """Upper half of the 128-bit product by 32-bit pieces; a signed one from the unsigned one (Hacker's Delight)."""
    x, y = a.view(np.uint64), b.view(np.uint64)
    x0, x1, y0, y1 = x & 0xFFFFFFFF, x >> 32, y & 0xFFFFFFFF, y >> 32
    middle = x1 * y0 + (x0 * y0 >> 32)
    high = x1 * y1 + (middle >> 32) + (x0 * y1 + (middle & 0xFFFFFFFF) >> 32)
    if a.dtype == np.int64:
        high = high - np.where(a < 0, y, 0).astype(np.uint64) - np.where(b < 0, x, 0).astype(np.uint64)
    return high.view(a.dtype)


def _product(opcode: Opcode, format: Format) -> tuple[Callable, Format]:
    """mul's .lo, .hi or .wide, and the format of its result."""
    part = opcode.one_of("lo", "hi", "wide")
    if part == "lo":
        return np.multiply, format
    if format.bits == 64:
        if part == "wide":
            opcode.refuse("128 bits")
        return _multiply_high64, format
    wide = FORMATS[f"{format.kind}{format.bits * 2}"]
    dtype = wide.decode(np.zeros(1, wide.raw)).dtype
    if part == "wide":
        return lambda a, b: np.multiply(a, b, dtype=dtype), wide
    return lambda a, b: np.multiply(a, b, dtype=dtype) >> format.bits, format


@operation("add", "sub", "mul", "fma", "mad", "addc", "madc")
def _arithmetic(opcode: Opcode) -> Operation:
    format = opcode.format("usf")
    if opcode.root in ("addc", "madc") or "cc" in opcode.modifiers:
        return _with_carry(opcode, format)
    if format.kind == "f":
        root = "fma" if opcode.root == "mad" else opcode.root
        # without .rn ptxas may contract mul and add; the text alone means a rounding each
        opcode.one_of("rn", default="" if opcode.root in ("add", "sub", "mul") else None)
        compute = flushing(opcode, format, _FLOAT.get(format.name, _HALF)[root])
        return Operation((format,), (format,) * (3 if root == "fma" else 2), compute)
    if opcode.root in ("add", "sub"):
        return Operation((format,), (format, format), np.add if opcode.root == "add" else np.subtract)
    product, result = _product(opcode, format)
    if opcode.root == "mul":
        return Operation((result,), (format, format), product)
    if opcode.root == "fma":
        opcode.refuse("the type")
    dtype = result.decode(np.zeros(1, result.raw)).dtype
    return Operation((result,), (format, format, result), lambda a, b, c: product(a, b).astype(dtype, copy=False) + c)


def _with_carry(opcode: Opcode, format: Format) -> Operation:
    """add, mad with carry out (.cc), and in (…c): "Extended-Precision Integer Arithmetic Instructions"."""
    if format.name != "u32":
        opcode.refuse("the type")
    carry_out, multiplies = opcode.has("cc"), opcode.root.startswith("mad")
    shift = 32 if multiplies and opcode.one_of("lo", "hi") == "hi" else 0

    def compute(*values: Array) -> tuple[Array, Array]:
        a, b, *rest = (value.astype(np.uint64) for value in values)
        total = sum(rest, (a * b >> shift & 0xFFFFFFFF) if multiplies else a + b)
        return total.astype(np.uint32), total >> 32 != 0

    arguments = (U32,) * (3 if multiplies else 2) + ((PRED,) if opcode.root.endswith("c") else ())
    if carry_out:
        return Operation((U32, PRED), arguments, compute)
    return Operation((U32,), arguments, lambda *values: compute(*values)[0])


@operation("div", "rem")
def _divide(opcode: Opcode) -> Operation:
    format = opcode.format("usf" if opcode.root == "div" else "us")
    if format.kind == "f":
        opcode.one_of("rn", *(("full", "approx") if format.name == "f32" else ()))
        if format.bits == 16 or format.name.endswith("x2"):
            opcode.refuse("the type")
        return Operation((format,), (format, format), flushing(opcode, format, np.divide))
    raw = format.raw

    def compute(a: Array, b: Array) -> Array:
        # towards zero; by zero the result is unspecified, here all ones
        negative = (a < 0) != (b < 0)
        x, y = np.abs(a).view(raw), np.abs(b).view(raw)
        quotient = np.where(y == 0, raw.type(2**format.bits - 1), x // np.maximum(y, 1))
        quotient = np.where(negative, -quotient, quotient).view(a.dtype)
        return quotient if opcode.root == "div" else a - quotient * b

    return Operation((format,), (format, format), compute)


def _extreme(root: str, propagate_nan: bool) -> Callable:
    """Floating-point min or max: a number wins over NaN unless .NaN, and −0 < +0."""
    best = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[root][propagate_nan]

    def compute(a: Array, b: Array) -> Array:
        zero = a + b if root == "max" else -(-a - b)
        return np.where((a == 0) & (b == 0), zero, best(a, b))

    return compute


@operation("min", "max")
def _min_max(opcode: Opcode) -> Operation:
    format = opcode.format("usf")
    if format.kind != "f":
        return Operation((format,), (format, format), np.minimum if opcode.root == "min" else np.maximum)
    compute = _extreme(opcode.root, opcode.has("NaN"))
    if opcode.has("xorsign"):
        if not opcode.has("abs"):
            opcode.refuse("modifier .xorsign without .abs")
        magnitude = compute

        def compute(a: Array, b: Array) -> Array:
            sign = np.where(np.signbit(a) != np.signbit(b), -1, 1).astype(a.dtype)
            return np.copysign(magnitude(np.abs(a), np.abs(b)), sign)

    return Operation((format,), (format, format), flushing(opcode, format, compute))


@operation("neg", "abs")
def _sign(opcode: Opcode) -> Operation:
    format = opcode.format("sf")
    return Operation((format,), (format,), flushing(opcode, format, np.negative if opcode.root == "neg" else np.abs))


@operation("copysign")
def _copysign(opcode: Opcode) -> Operation:
    format = opcode.format("f", (32, 64))
    return Operation((format,), (format, format), lambda sign, value: np.copysign(value, sign))


_FUNCTIONS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@operation(*_FUNCTIONS)
def _function(opcode: Opcode) -> Operation:
    format, function = opcode.format("f", (32, 64)), _FUNCTIONS[opcode.root]
    exact = ("rn",) if opcode.root in ("rcp", "sqrt") else ()
    opcode.one_of(*exact, *(("approx",) if format.name == "f32" else ()))
    if format.name == "f64":
        return Operation((format,), (format,), function)
    # the quotient and the root of float32 numbers round twice as they would once
    compute = flushing(opcode, format, lambda x: function(x.astype(np.float64)).astype(np.float32))
    return Operation((format,), (format,), compute)
