"""Interrupts: Ctrl-C waits until weights can be saved, and stops all ranks at the same place.

One process is interrupted as usual, except in what is held. On several ranks a signal is noted and acted upon where
all of them come by: a launcher ends its ranks by SIGTERM, half a minute before SIGKILL.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hrf_fast import comm


class Interrupts:
    """Use as a context manager, on all ranks alike."""

    def __init__(self, note: Callable[[str], None]) -> None:
        """`note` shows the user a line."""
        self.note = note
        self._asked = False
        self._held = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if comm.world_size() > 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._handlers.items():
            # a stopped rank may be on its way out when the launcher's SIGTERM comes: it still ends with 130
            signal.signal(number, signal.SIG_IGN if kind is KeyboardInterrupt else handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold a Ctrl-C back until the block is done: weights are never saved in the middle of an update.

        On several ranks it is always held back, until they all know of it and are at the same place.
        """
        if comm.world_size() > 1:
            self._held += 1
            try:
                yield
            finally:
                self._held -= 1
            self.stop_if_asked()
            return
        try:
            previous = signal.signal(signal.SIGINT, self._note)
        except ValueError:
            # not the main thread: no Ctrl-C arrives here
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
        if self._asked:
            self._asked = False
            raise KeyboardInterrupt

    def stop_if_asked(self) -> None:
        """KeyboardInterrupt on all ranks when one of them was asked to stop, unless it is held."""
        if self._held == 0 and comm.world_size() > 1 and bool(comm.gather_rows(torch.tensor([self._asked])).any()):
            self._asked = False
            raise KeyboardInterrupt

    def _note(self, *_: object) -> None:
        first, self._asked = not self._asked, True
        if comm.world_size() > 1:
            if first:
                self.note("Ctrl-C: stopping as soon as all ranks are done with this")
            return
        self.note("Ctrl-C: stopping as soon as this is done (press again to stop at once, and lose it)")
        signal.signal(signal.SIGINT, signal.default_int_handler)
