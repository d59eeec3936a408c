"""Interrupts: Ctrl-C, SIGTERM and SIGHUP wait until weights can be saved, and stop all ranks at the same place.

One process is interrupted at once, except in what is held. On several ranks a signal is noted and acted upon where all
of them come by: a launcher ends its ranks by SIGTERM, half a minute before SIGKILL.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from hrf_fast.distributed import comm
from hrf_fast.errors import SIGNALS, Interrupted


class Interrupts:
    """Use as a context manager, on all ranks alike."""

    def __init__(self, note: Callable[[str], None]) -> None:
        """`note` shows the user a line."""
        self.note = note
        self._asked = False
        # the number of the first signal; 0 before there is one. A launcher answers Ctrl-C by SIGTERM to its ranks
        self._first = 0
        self._held = 0
        self._handlers: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Interrupts:
        # other threads get no signals
        if threading.current_thread() is threading.main_thread():
            # under nohup the hang-up is ignored, so that the run outlives its terminal
            ignored = {n for n in SIGNALS if n != signal.SIGINT and signal.getsignal(n) is signal.SIG_IGN}
            # None: set by a program that embeds Python, and not for Python to set
            heeded = [n for n in SIGNALS if n not in ignored and signal.getsignal(n) is not None]
            self._handlers = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = comm.world_size() > 1 and kind is not None and issubclass(kind, KeyboardInterrupt)
        for number, handler in self._handlers.items():
            # a stopped rank may be on its way out when the launcher's SIGTERM comes: its exit code stays the first's
            signal.signal(number, signal.SIG_IGN if stopped else handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold signals back until the block is done: weights are never saved in the middle of an update."""
        self.hold()
        try:
            yield
        finally:
            self.release()
        self.stop_if_asked()

    def hold(self) -> None:
        """Hold signals back until `release`."""
        self._held += 1

    def release(self) -> None:
        """End `hold`; `stop_if_asked` then acts on what came in between."""
        self._held -= 1

    def stop_if_asked(self) -> None:
        """Raise Interrupted on all ranks when one of them was asked to stop, unless signals are held."""
        if self._held:
            return
        numbers = comm.gather_rows(torch.tensor([self._first if self._asked else 0])).tolist()
        if any(numbers):
            self._asked = False
            raise Interrupted(min(number for number in numbers if number))

    def _handle(self, number: int, _: object) -> None:
        if os.getpid() != self._process:
            # a process that user code has forked does as it would without a run: a Pool ends its workers by SIGTERM
            signal.signal(number, self._handlers[number])
            os.kill(os.getpid(), number)
            return
        again, self._asked, self._first = self._asked, True, self._first or number
        name = signal.Signals(number).name
        if comm.world_size() > 1:
            if not again:
                self._say(f"{name}: stopping as soon as all ranks are done with this")
        elif again or not self._held:
            self._asked = False
            raise Interrupted(self._first)
        else:
            self._say(f"{name}: stopping as soon as this is done (send it again to stop at once, and lose it)")

    def _say(self, line: str) -> None:
        # Python's files refuse a print in the middle of another, which the signal may have come into; a terminal that
        # was closed, or a `tee` that the same Ctrl-C has ended, can't be told
        with suppress(RuntimeError, OSError):
            self.note(line)
