"""What the 32 threads of a warp do together: shuffles and reductions (PTX ISA, "shfl.sync", "redux.sync").

All lanes that take part have to be active at once: real hardware waits for them or leaves the result undefined, and
here that raises.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray as Array

from tests.ptx.memory import WARP
from tests.ptx.parser import PtxError


class DivergentWarp(PtxError):
    """A warp instruction that names, or reads from, a lane that is not there."""


def members(count: int, active: Array | None, membermask: Array) -> Array:
    """[threads] bool: the lanes that the mask names, all of which must be active."""
    named = (membermask >> np.arange(count, dtype=np.uint32) % WARP & 1).astype(bool)
    if active is None:
        missing = ~named
    else:
        # a warp that is elsewhere takes no part
        here = np.repeat(active.reshape(-1, WARP).any(1), WARP)
        missing = here & (named != active)
    if missing.any():
        raise DivergentWarp(f"lane {int(missing.argmax()) % WARP} is not both active and in the member mask")
    return named


def shuffle_lanes(
    mode: str, a: Array, b: Array, c: Array, membermask: Array, active: Array | None, count: int
) -> tuple[Array, Array]:
    """Each lane's `a` of the lane that mode, b and c choose, and whether that lane lies in its segment."""
    members(count, active, membermask)
    lane = np.arange(count) % WARP
    segment, clamp = (c >> 8 & 31).astype(np.int64), (c & 31).astype(np.int64)
    offset = (b & 31).astype(np.int64)
    first, last = lane & segment, (lane & segment) | (clamp & ~segment)
    source = {"up": lane - offset, "down": lane + offset, "bfly": lane ^ offset, "idx": first | (offset & ~segment)}[
        mode
    ]
    inside = source >= last if mode == "up" else source <= last
    source = np.where(inside, source, lane) + np.arange(count) // WARP * WARP
    return np.broadcast_to(a, count)[source], inside


_REDUCTIONS = {
    "add": (np.add, 0, 0),
    "min": (np.minimum, 2**32 - 1, 2**31 - 1),
    "max": (np.maximum, 0, -(2**31)),
    "and": (np.bitwise_and, 2**32 - 1, -1),
    "or": (np.bitwise_or, 0, 0),
    "xor": (np.bitwise_xor, 0, 0),
}


def reduce_lanes(name: str, a: Array, membermask: Array, active: Array | None, count: int) -> Array:
    """Every member gets the reduction of its warp's `a`, which is 32-bit and wraps."""
    function, unsigned, signed = _REDUCTIONS[name]
    identity = a.dtype.type(signed if a.dtype.kind == "i" else unsigned)
    values = np.where(members(count, active, membermask), a, identity).reshape(-1, WARP)
    return np.repeat(function.reduce(values, axis=1, dtype=a.dtype), WARP)
