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

from hrf_fast.distributed import comm


class Interrupts:
    """Use as a context manager, on all ranks alike."""

    def __init__(self, note: Callable[[str], None]) -> None:
        """`note` shows the user a line."""
        self.note = note
        self._asked = False
        self._held = 0
        self._handlers: dict[int, Any] = {}
        # the handler of Ctrl-C that `hold` stands in for
        self._previous: Any = None

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
        """Hold a Ctrl-C back until the block is done: weights are never saved in the middle of an update."""
        self.hold()
        try:
            yield
        finally:
            self.release()
        self.stop_if_asked()

    def hold(self) -> None:
        """Hold a Ctrl-C back until `release`; on several ranks until they all know of it and are at the same place."""
        if self._held == 0 and comm.world_size() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        # after the handler: a Ctrl-C before it interrupts what is not held yet
        self._held += 1

    def release(self) -> None:
        """End `hold`; `stop_if_asked` then acts on what came in between."""
        self._held -= 1
        if self._held == 0 and self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def stop_if_asked(self) -> None:
        """KeyboardInterrupt on all ranks when one of them was asked to stop, unless it is held."""
        if self._held == 0 and bool(comm.gather_rows(torch.tensor([self._asked])).any()):
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
