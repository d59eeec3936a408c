"""Stopwatch: how long the UNet's forwards and backwards take within an iteration; the rest of it is overhead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up blocks of work on a device; on CUDA by events, which are read at the end and never waited for before."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._cuda:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self._events.append((first, last))
            return
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    def restart(self) -> float:
        """The seconds since the last restart."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds = sum(first.elapsed_time(last) for first, last in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds
