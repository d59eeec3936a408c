"""Number formats of PTX ("Types", "Instruction Operands"): register bits to numpy values and back.

Values of f16 and bf16 are held in float64, where their sums of products can be rounded to odd; a second rounding to
the format is then right to the bit (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008). NaN
payloads are not modelled, except that conversions to 16-bit floats give the canonical 0x7FFF.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

TINY = np.finfo(np.float32).tiny


class Format(NamedTuple):
    """One fundamental type. Bits are a 1-D unsigned array (bool for pred); one element stands for all threads."""

    name: str
    kind: str
    """u, s, b, f, or p for a predicate."""
    bits: int
    raw: np.dtype
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]
    """Rounds to nearest even."""


def round_to_odd(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to the neighbour with an odd last bit when inexact, by the error of TwoSum."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    bits = total.view(np.int64)
    inexact = ((error > 0) | (error < 0)) & (bits & 1 == 0)
    return np.where(inexact, bits + np.where((error > 0) == (total > 0), 1, -1), bits).view(np.float64)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a·b + c rounded once to float32: the product is exact in float64, the sum is rounded to odd where it matters."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    # rounding twice differs from rounding once only where the first lands on a midpoint of the second
    midpoint = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    if (midpoint | (np.abs(total) < TINY)).any():
        total = round_to_odd(product, c)
    return total.astype(np.float32)


_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fma.restype, _libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3


def fma64(a: Array, b: Array, c: Array) -> Array:
    """One thread at a time by the C library, which rounds once."""
    return np.frompyfunc(_libm.fma, 3, 1)(a, b, c).astype(np.float64)


def flush(x: Array) -> Array:
    """.ftz: a subnormal float32 becomes a zero of its sign."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def _decode_bf16(raw: Array) -> Array:
    return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _encode_bf16(x: Array) -> Array:
    single = x.astype(np.float32, copy=False)
    bits = single.view(np.uint32)
    if x.dtype != np.float32:
        # to odd: the truncated float32 with its last bit set
        bits = np.where(single != x, (bits - (np.abs(single) > np.abs(x))) | 1, bits).astype(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def _encode_f16(x: Array) -> Array:
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def _packed(name: str, half: Format) -> Format:
    """Two halves in 32 bits: values are [threads, 2], the lower half first."""
    return Format(
        name,
        "f",
        32,
        np.dtype(np.uint32),
        lambda raw: half.decode(raw.view(np.uint16).reshape(-1, 2)),
        lambda x: np.ascontiguousarray(half.encode(x)).view(np.uint32).reshape(-1),
    )


def _integer(kind: str, bits: int) -> Format:
    raw, value = np.dtype(f"u{bits // 8}"), np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}")
    return Format(
        f"{kind}{bits}", kind, bits, raw, lambda x: x.view(value), lambda x: x.astype(value, copy=False).view(raw)
    )


def _float(bits: int) -> Format:
    raw, value = np.dtype(f"u{bits // 8}"), np.dtype(f"f{bits // 8}")
    return Format(f"f{bits}", "f", bits, raw, lambda x: x.view(value), lambda x: x.astype(value, copy=False).view(raw))


def _formats() -> dict[str, Format]:
    u16 = np.dtype(np.uint16)
    f16 = Format("f16", "f", 16, u16, lambda raw: raw.view(np.float16).astype(np.float64), _encode_f16)
    bf16 = Format("bf16", "f", 16, u16, _decode_bf16, _encode_bf16)
    pred = Format("pred", "p", 1, np.dtype(bool), lambda raw: raw, lambda x: x)
    integers = [_integer(kind, bits) for kind in "usb" for bits in (8, 16, 32, 64)]
    floats = [f16, bf16, _packed("f16x2", f16), _packed("bf16x2", bf16), _float(32), _float(64)]
    return {format.name: format for format in [pred, *integers, *floats]}


FORMATS = _formats()


def narrow(x: Array, to: Format, mode: str) -> Array:
    """The bits of x in a floating-point format, rounded to nearest even (rn), zero (rz), −∞ (rm) or +∞ (rp)."""
    bits = to.encode(x)
    if mode == "rn":
        return bits
    nearest = to.decode(bits).astype(np.float64)
    if mode == "rz":
        step = -(np.abs(nearest) > np.abs(x)).astype(np.int64)
    else:
        upward = 1 if mode == "rp" else -1
        wrong = nearest < x if mode == "rp" else nearest > x
        # bits are sign and magnitude: one more is away from zero
        step = wrong * np.where(x > 0, upward, -upward)
    return (bits + step.astype(to.raw)).astype(to.raw)
