"""What threads read and write (PTX ISA, "State Spaces"): registers, shared memory, and the tensors of the host.

Every access is checked: for a register that was written, for bounds and for alignment. Global traffic is counted per
tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from tests.ptx.parser import Kernel, PtxError

Grid = tuple[int, int, int]

WARP = 32
SECTOR = 32

SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
"""Read-only registers; blocks have one dimension, as Triton's do."""


class OutOfBounds(PtxError):
    """An access to an address that no tensor, or no shared memory, covers."""


@dataclass
class Traffic:
    """Bytes that threads asked for, and the distinct 32-byte sectors that each warp instruction touched, summed.

    Threads that load the same element (a block smaller than the CTA, a scalar) ask for it once each.
    """

    read_bytes: int = 0
    written_bytes: int = 0
    read_sectors: int = 0
    written_sectors: int = 0

    def count(self, write: bool, asked: int, sectors: int) -> None:
        if write:
            self.written_bytes += asked
            self.written_sectors += sectors
        else:
            self.read_bytes += asked
            self.read_sectors += sectors


class Region:
    """Memory of the host, [start, start + size), under a name. Its traffic is counted."""

    def __init__(self, name: str, start: int, size: int) -> None:
        self.name, self.start, self.size = name, start, size
        self.traffic: Traffic | None = Traffic()
        # bytes from an aligned address on, so that every aligned access is a whole row of them
        self.base = start & ~31
        self.data = np.ctypeslib.as_array((ctypes.c_uint8 * (start + size - self.base)).from_address(self.base))

    def covers(self, address: Array, size: int) -> Array:
        # unsigned: an address below the start wraps to a huge offset
        return address - np.uint64(self.start) < max(self.size - size + 1, 0)

    def distance(self, address: int) -> int:
        return max(self.start - address, address - (self.start + self.size - 1), 0)

    def offset(self, address: Array, lanes: Array) -> Array:
        return address - np.uint64(self.base)


class SharedMemory(Region):
    """`size` bytes from address 0 on for each CTA; 0xFF at first, which reads as NaN."""

    def __init__(self, size: int, cta: Array) -> None:
        self.name, self.start, self.size, self.traffic = "shared memory", 0, size, None
        self.cta, self.stride = cta.astype(np.uint64), np.uint64(-(-size // 32) * 32)
        self.data = np.full(int((self.cta[-1] + 1) * self.stride), 0xFF, np.uint8)

    def offset(self, address: Array, lanes: Array) -> Array:
        return self.cta[lanes] * self.stride + address


def rows(
    regions: Sequence[Region], address: Array, lanes: Array, dtype: np.dtype, count: int, write: bool
) -> tuple[Array, Array]:
    """The memory as [rows, count] elements, and the row at each lane's address; `lanes` are indices of threads.

    One instruction accesses one region, the first that covers it all.
    """
    size = dtype.itemsize * count
    if (wrong := address & np.uint64(size - 1)).any():
        raise PtxError(f"{size} bytes at {int(address[wrong.argmax()]):#x}, which is not a multiple of {size}")
    for region in regions:
        if region.covers(address, size).all():
            if region.traffic:
                region.traffic.count(write, len(address) * size, count_sectors(address, lanes))
            table = region.data[: len(region.data) // size * size].view(dtype).reshape(-1, count)
            return table, region.offset(address, lanes) // np.uint64(size)
    # of the region that covers most of them, else of the nearest one
    region = max(regions, key=lambda region: (region.covers(address, size).sum(), -region.distance(int(address[0]))))
    outside = int(address[~region.covers(address, size)][0])
    raise OutOfBounds(
        f"{'write' if write else 'read'} of {size} bytes at {outside:#x}, "
        f"which is byte {outside - region.start} of {region.name} of {region.size} bytes"
    )


def count_sectors(address: Array, lanes: Array) -> int:
    """Distinct pairs of a warp and a sector. An aligned access of up to 32 bytes lies in one sector."""
    warp, sector = lanes // WARP, address // SECTOR
    other_warp = warp[1:] != warp[:-1]
    if not (other_warp | (sector[1:] >= sector[:-1])).all():
        sector = sector[np.lexsort((sector, warp))]
    return 1 + int(np.count_nonzero(other_warp | (sector[1:] != sector[:-1])))


class Batch:
    """Threads of some CTAs. An array of one element stands for all threads; arrays are never written in place."""

    def __init__(
        self, kernel: Kernel, grid: Grid, ctas: Array, params: dict[str, bytes], regions: list[Region], shared: int
    ) -> None:
        self.threads, self.count = kernel.threads, len(ctas) * kernel.threads
        self.registers: list[Array | None] = [None] * len(kernel.registers)
        self.types = list(kernel.registers.values())
        self.partial: dict[int, Array] = {}
        """Which threads have written a register that not all have."""
        self.halves: dict[int, dict[str, Array]] = {}
        """Of such a register that was packed of two halves, which threads have not written each."""
        self.active: Array | None = None
        """[count] bool; None when every thread is."""
        self.unwritten: Array | None = None
        """[count] bool: threads of which the running statement has read a register that they have not written."""
        self.everyone = np.arange(self.count)
        cta, (x, y, z) = np.repeat(ctas, self.threads), grid
        values = (self.everyone % self.threads, cta % x, cta // x % y, cta // (x * y), x, y, z)
        self.special = {name: np.atleast_1d(v).astype(np.uint32) for name, v in zip(SPECIAL, values, strict=True)}
        self.params = params
        self.memory = {"global": regions, "shared": [SharedMemory(shared, self.everyone // self.threads)]}

    @property
    def here(self) -> Array | slice:
        """Index of the active threads."""
        return slice(None) if self.active is None else self.active

    def read(self, index: int) -> Array:
        raw, written = self.registers[index], self.partial.get(index)
        if raw is None:
            raw, written = np.zeros(1, self.types[index]), np.zeros(self.count, bool)
        if written is not None:
            missing = ~written if self.active is None else self.active & ~written
            if missing.any():
                self.unwritten = missing if self.unwritten is None else self.unwritten | missing
        return raw

    def write(self, index: int, raw: Array) -> None:
        """What is computed from a register that a thread has not written is not written either."""
        old = self.registers[index]
        self.halves.pop(index, None)
        if self.active is None and self.unwritten is None:
            self.partial.pop(index, None)
        else:
            active = np.ones(self.count, bool) if self.active is None else self.active
            before = np.full(self.count, old is not None) if index not in self.partial else self.partial[index]
            written = active if self.unwritten is None else active & ~self.unwritten
            self.partial[index] = before & ~active | written
            if self.partial[index].all():
                del self.partial[index]
            raw = raw if old is None else np.where(active, raw, old)
        self.registers[index] = raw

    def missing_of(self, source: Callable[[Batch], Array]) -> Array:
        """The active threads that have not written an operand, [count] bool; the statement has not read it by that."""
        before, self.unwritten = self.unwritten, None
        source(self)
        missing, self.unwritten = self.unwritten, before
        return np.zeros(self.count, bool) if missing is None else missing

    def keep_halves(self, index: int, low: Array, high: Array) -> None:
        """Remember which half of a register that was just packed its threads have not written."""
        if index in self.partial:
            others = np.zeros(self.count, bool) if self.active is None else ~self.active & ~self.partial[index]
            self.halves[index] = {"low": low | others, "high": high | others}

    @contextmanager
    def half(self, index: int | None, part: str) -> Iterator[None]:
        """A block that takes one half of a register: only that must be written."""
        halves = self.halves.get(index, {}).get(part) if index is not None else None
        if halves is None or index is None:
            yield
            return
        whole = self.partial[index]
        self.partial[index], self.unwritten = ~halves, None
        try:
            yield
        finally:
            self.partial[index] = whole
            self.unwritten = None

    def require_written(self) -> None:
        """Where a value decides something that others see: an address, a branch, what is stored."""
        if self.unwritten is not None:
            raise PtxError(f"a source was not written by thread {self.unwritten.argmax() % self.threads}")

    def require_whole_warps(self) -> None:
        """Real hardware waits for the missing lanes, or leaves the result undefined."""
        if self.active is not None:
            warps = self.active.reshape(-1, WARP)
            missing = warps.any(1, keepdims=True) & ~warps
            if missing.any():
                raise PtxError(f"lane {int(missing.argmax()) % WARP} has not come along")
