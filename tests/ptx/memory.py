"""State spaces (PTX ISA, "State Spaces"): host memory of tensors as global memory, byte arrays as shared and local.

Every access is checked for bounds and alignment. Global traffic is counted per tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy import ndarray as Array

from tests.ptx.parser import PtxError

WARP = 32
SECTOR = 32


class OutOfBounds(PtxError):
    """An access to an address that no tensor, or no shared or local memory, covers."""


class MisalignedAccess(PtxError):
    """An address that is not a multiple of the bytes of the (vector) access."""


@dataclass
class Traffic:
    """Bytes that threads asked for, and the distinct 32-byte sectors that each warp instruction touched, summed.

    Threads that load the same element (a block smaller than the CTA, a scalar) ask for it once each.
    """

    read_bytes: int = 0
    written_bytes: int = 0
    read_sectors: int = 0
    written_sectors: int = 0


class Buffer:
    """Bytes that are seen as rows of elements."""

    def __init__(self, data: Array) -> None:
        self.data = data
        self._rows: dict[tuple[np.dtype, int], Array] = {}

    def rows(self, dtype: np.dtype, count: int) -> Array:
        """[rows, count] of dtype, from the first byte on."""
        key = dtype, count
        if key not in self._rows:
            size = dtype.itemsize * count
            self._rows[key] = self.data[: len(self.data) // size * size].view(dtype).reshape(-1, count)
        return self._rows[key]


class Region(Buffer):
    """Host memory [start, start + size) under a name."""

    def __init__(self, name: str, start: int, size: int, traffic: Traffic | None = None) -> None:
        # from an aligned address on, so that aligned accesses are whole rows; the bounds are checked against start
        self.base = start & ~31
        end = start + size
        super().__init__(np.frombuffer((ctypes.c_uint8 * (end - self.base)).from_address(self.base), np.uint8))
        self.name, self.start, self.size, self.traffic = name, start, size, traffic

    def distance(self, address: int) -> int:
        return max(self.start - address, address - (self.start + self.size - 1), 0)


Accesses = Iterator[tuple[Buffer, Array | slice, Array]]
"""A buffer, which of the addresses lie in it, and their offsets in bytes."""


class GlobalMemory:
    """The regions that a kernel was given. An address in two of them belongs to the first."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = [region for region in regions if region.size > 0]

    def resolve(self, address: Array, lanes: Array, size: int, write: bool) -> Accesses:
        _check_alignment(address, size)
        pending: Array | slice = slice(None)
        for region in self.regions:
            # unsigned: an address below the start wraps to a huge offset
            inside = address[pending] - np.uint64(region.start) <= region.size - size if region.size >= size else False
            if np.all(inside):
                yield self._access(region, pending, address, lanes, size, write)
                return
            if np.any(inside):
                pending = np.arange(len(address))[pending]
                yield self._access(region, pending[inside], address, lanes, size, write)
                pending = pending[~inside]
        self._refuse(int(address[pending][0]), size, "write" if write else "read")

    def _access(
        self, region: Region, chosen: Array | slice, address: Array, lanes: Array, size: int, write: bool
    ) -> tuple[Buffer, Array | slice, Array]:
        address = address[chosen]
        if traffic := region.traffic:
            sectors, asked = count_sectors(address, lanes[chosen]), len(address) * size
            if write:
                traffic.written_bytes += asked
                traffic.written_sectors += sectors
            else:
                traffic.read_bytes += asked
                traffic.read_sectors += sectors
        return region, chosen, address - np.uint64(region.base)

    def _refuse(self, address: int, size: int, verb: str) -> None:
        if not self.regions:
            raise OutOfBounds(f"{verb} of {size} bytes at {address:#x}, and the kernel was given no memory")
        nearest = min(self.regions, key=lambda region: region.distance(address))
        raise OutOfBounds(
            f"{verb} of {size} bytes at {address:#x}, which is byte {address - nearest.start} of the nearest tensor "
            f"{nearest.name} of {nearest.size} bytes"
        )


class OwnedMemory(Buffer):
    """Shared memory of each CTA, or local memory of each thread; 0xFF at first, which reads as NaN."""

    def __init__(self, space: str, size: int, owner: Array) -> None:
        self.stride = -(-size // 32) * 32
        super().__init__(np.full((int(owner[-1]) + 1) * self.stride, 0xFF, np.uint8))
        self.space, self.size, self.owner = space, size, owner

    def resolve(self, address: Array, lanes: Array, size: int, write: bool) -> Accesses:
        _check_alignment(address, size)
        outside = address > max(self.size - size, 0) if self.size >= size else np.ones(len(address), bool)
        if outside.any():
            verb = "write" if write else "read"
            where = int(address[outside.argmax()])
            raise OutOfBounds(f"{verb} of {size} bytes at {where} of {self.size} bytes of {self.space} memory")
        yield self, slice(None), self.owner[lanes] * self.stride + address.astype(np.int64)


def _check_alignment(address: Array, size: int) -> None:
    wrong = address & address.dtype.type(size - 1)
    if wrong.any():
        raise MisalignedAccess(f"{size} bytes at {int(address[wrong.argmax()]):#x}, not a multiple of {size}")


def count_sectors(address: Array, lanes: Array) -> int:
    """Distinct pairs of a warp and a sector. An aligned access of up to 32 bytes lies in one sector."""
    warp, sector = lanes // WARP, address // SECTOR
    other_warp = warp[1:] != warp[:-1]
    if not (other_warp | (sector[1:] >= sector[:-1])).all():
        order = np.lexsort((sector, warp))
        sector = sector[order]
    return 1 + int(np.count_nonzero(other_warp | (sector[1:] != sector[:-1])))


def load(space: GlobalMemory | OwnedMemory, address: Array, lanes: Array, dtype: np.dtype, count: int) -> Array:
    """[lanes, count] elements from one address per lane."""
    size = dtype.itemsize * count
    result = np.empty((len(lanes), count), dtype)
    for buffer, chosen, offset in space.resolve(address, lanes, size, False):
        result[chosen] = buffer.rows(dtype, count)[offset // size]
    return result


def store(space: GlobalMemory | OwnedMemory, address: Array, lanes: Array, values: Array) -> None:
    """[lanes, count] elements to one address per lane; of equal addresses the last lane's wins."""
    size = values.itemsize * values.shape[1]
    for buffer, chosen, offset in list(space.resolve(address, lanes, size, True)):
        buffer.rows(values.dtype, values.shape[1])[offset // size] = values[chosen]
