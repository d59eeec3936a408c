"""Memory of a training process: its resident set, and the bytes that autograd holds for a backward."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hrf_fast.devices import peak_memory_bytes


def resident_bytes() -> int:
    """Resident set of this process now; its peak so far where the system doesn't say."""
    path = Path("/proc/self/statm")
    if path.exists():
        return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory_bytes(torch.device("cpu"))


class SavedTensors:
    """Live bytes of the tensors that autograd holds for a backward, each storage once, and their peak."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        # storage address -> [bytes, holders]
        self._storages: dict[int, list[int]] = {}
        self._ignored: set[int] = set()

    def ignore(self, tensors: Sequence[Any]) -> None:
        """Leave tensors out, such as weights, which autograd saves but which are there anyway."""
        self._ignored |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def reset(self) -> None:
        self.peak = self.live

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved inside; gradient checkpointing has hooks of its own and is seen at its blocks' edges."""
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(self, tensor), lambda held: held.tensor):
            yield

    def hold(self, address: int, size: int) -> None:
        entry = self._storages.setdefault(address, [size, 0])
        entry[1] += 1
        if entry[1] == 1:
            self.live += size
            self.peak = max(self.peak, self.live)

    def release(self, address: int) -> None:
        entry = self._storages[address]
        entry[1] -= 1
        if entry[1] == 0:
            self.live -= self._storages.pop(address)[0]


class _Held:
    """A saved tensor's stand-in, which autograd holds and which dies with the graph."""

    def __init__(self, counter: SavedTensors, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        # an output that held itself would keep its graph alive where no backward comes
        self.tensor, self._address = tensor.detach(), storage.data_ptr()
        self._counter = None if self._address in counter._ignored else counter
        if self._counter:
            self._counter.hold(self._address, storage.nbytes())

    def __del__(self) -> None:
        if self._counter:
            self._counter.release(self._address)
