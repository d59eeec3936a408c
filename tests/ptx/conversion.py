"""Comparison, selection, moves and conversions: "Comparison and Selection", "Data Movement and Conversion"."""

from __future__ import annotations

import numpy as np
from numpy import ndarray as Array

from tests.ptx.formats import FORMATS, Format, flush, narrow
from tests.ptx.opcodes import B32, B64, PRED, U64, Opcode, Operation, operation

_COMPARE = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "ne": np.not_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_ORDERED = {**{name: _COMPARE[name] for name in ("eq", "lt", "le", "gt", "ge")}, "ne": lambda a, b: (a < b) | (a > b)}
_NEGATED = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
_FLOAT_COMPARE = {
    **_ORDERED,
    # an unordered comparison is true of NaN: the opposite of the ordered opposite
    **{name: (lambda a, b, opposite=_ORDERED[other]: ~opposite(a, b)) for name, other in _NEGATED.items()},
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@operation("setp")
def _compare(opcode: Opcode) -> Operation:
    """Two results, p = t op c and q = !t op c; the interpreter stores as many as the instruction names."""
    format = opcode.format()
    if format.name.endswith("x2"):
        opcode.refuse("the type")
    names = {"f": tuple(_FLOAT_COMPARE), "b": ("eq", "ne"), "s": tuple(_ORDERED), "u": tuple(_COMPARE)}[format.kind]
    compare = (_FLOAT_COMPARE if format.kind == "f" else _COMPARE)[opcode.one_of(*names)]
    flushes = opcode.has("ftz")
    if flushes and format.name != "f32":
        opcode.refuse("modifier .ftz of this type")
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(
        opcode.one_of("and", "or", "xor", default="")
    )

    def compute(a: Array, b: Array, *other: Array) -> tuple[Array, Array]:
        true = compare(flush(a), flush(b)) if flushes else compare(a, b)
        return (combine(true, *other), combine(~true, *other)) if combine else (true, ~true)

    return Operation((PRED, PRED), (format, format, *((PRED,) if combine else ())), compute)


@operation("selp")
def _select(opcode: Opcode) -> Operation:
    bits = FORMATS[f"b{opcode.format().bits}"]
    return Operation((bits,), (bits, bits, PRED), lambda a, b, condition: np.where(condition, a, b))


@operation("mov")
def _move(opcode: Opcode) -> Operation:
    format = opcode.format("usbfp")
    bits = format if format.kind == "p" else FORMATS[f"b{format.bits}"]
    return Operation((bits,), (bits,), lambda a: a)


@operation("cvta")
def _to_global(opcode: Opcode) -> Operation:
    """Generic addresses of global memory are its own."""
    opcode.one_of("to")
    opcode.one_of("global")
    opcode.format("u", (64,))
    return Operation((U64,), (U64,), lambda a: a)


@operation("createpolicy")
def _cache_policy(opcode: Opcode) -> Operation:
    """A hint to the cache, worth any number; its fraction is read as the immediate it is."""
    opcode.format("b", (64,))
    opcode.one_of("fractional")
    opcode.one_of("L2::evict_first", "L2::evict_last", "L2::evict_unchanged")
    return Operation((B64,), (FORMATS["f32"],), lambda fraction: np.zeros(1, np.uint64))


_ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@operation("cvt")
def _convert(opcode: Opcode) -> Operation:
    widths = (8, 16, 32, 64)
    source, target = opcode.format("usf", widths), opcode.format("usf", widths)
    to_integer, to_float = (
        opcode.one_of(*_ROUND_TO_INTEGER, default=""),
        opcode.one_of("rn", "rz", "rm", "rp", default=""),
    )
    if target.name.endswith("x2"):
        if source.name != "f32" or to_float not in ("rn", "rz"):
            opcode.refuse("the types or the rounding")
        return _convert_pair(target, source, to_float)
    if source.name.endswith("x2") or (to_integer and to_float):
        opcode.refuse("the types or the rounding")
    if source.kind == "f":
        flushes = opcode.has("ftz")
        if flushes and "f32" not in (source.name, target.name):
            opcode.refuse("modifier .ftz of this type")
        if target.kind == "f":
            return _float_to_float(opcode, target, source, to_integer, to_float, flushes)
        if not to_integer:
            opcode.refuse("it needs .rni, .rzi, .rmi or .rpi")
        opcode.has("sat")  # float to integer always saturates
        round_ = _ROUND_TO_INTEGER[to_integer]
        flush_ = flush if flushes and source.name == "f32" else lambda x: x
        return Operation((target,), (source,), lambda x: _to_integer(round_(flush_(x)), source, target))
    if target.kind == "f":
        if not to_float or to_integer or (source.bits == 64 and (target.bits == 16 or to_float != "rn")):
            opcode.refuse("the types or the rounding")
        if source.bits == 64:
            return Operation((target,), (source,), lambda x: x.astype(f"f{target.bits // 8}"))
        return Operation(
            (FORMATS[f"b{target.bits}"],), (source,), lambda x: narrow(x.astype(np.float64), target, to_float)
        )
    if to_integer or to_float:
        opcode.refuse("a rounding between integers")
    if opcode.has("sat"):
        low, high = (_limits(target)[i] for i in (0, 1))
        low, high = max(low, _limits(source)[0]), min(high, _limits(source)[1])
        return Operation((target,), (source,), lambda x: np.clip(x, low, high))
    return Operation((target,), (source,), lambda x: x)


def _limits(format: Format) -> tuple[int, int]:
    return (-(2 ** (format.bits - 1)), 2 ** (format.bits - 1) - 1) if format.kind == "s" else (0, 2**format.bits - 1)


def _to_integer(x: Array, source: Format, target: Format) -> Array:
    low, high = _limits(target)
    dtype = np.dtype(f"{'i' if target.kind == 's' else 'u'}{target.bits // 8}")
    nan = 1 << (target.bits - 1) if source.name == "f64" or target.bits == 64 else 0
    # float(high) may be high + 1, which no float of this size lies below without being exact
    clamped = np.where(x >= float(high), dtype.type(high), np.where(x <= float(low), dtype.type(low), x.astype(dtype)))
    return np.where(np.isnan(x), np.array(nan, target.raw).view(dtype), clamped)


def _float_to_float(
    opcode: Opcode, target: Format, source: Format, to_integer: str, to_float: str, flushes: bool
) -> Operation:
    narrows = target.bits < source.bits or {source.name, target.name} == {"f16", "bf16"}
    if narrows != bool(to_float) or (to_integer and source.name != target.name):
        opcode.refuse("the rounding")

    def compute(x: Array) -> Array:
        if flushes and source.name == "f32":
            x = flush(x)
        if to_integer:
            x = _ROUND_TO_INTEGER[to_integer](x)
        bits = narrow(x, target, to_float) if narrows else target.encode(x)
        return flush(bits.view(np.float32)).view(np.uint32) if flushes and target.name == "f32" else bits

    return Operation((FORMATS[f"b{target.bits}"],), (source,), compute)


def _convert_pair(target: Format, source: Format, mode: str) -> Operation:
    """`cvt.rn.bf16x2.f32 d, a, b`: a goes to the upper half."""
    half = FORMATS[target.name.removesuffix("x2")]

    def compute(upper: Array, lower: Array) -> Array:
        return narrow(upper, half, mode).astype(np.uint32) << 16 | narrow(lower, half, mode)

    return Operation((B32,), (source, source), compute)
