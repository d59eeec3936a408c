"""Errors that every layer knows."""

from __future__ import annotations

import signal


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and the run has stopped where its weights could be saved."""

    def __init__(self, number: int) -> None:
        """`number` is the signal's."""
        super().__init__(number)
        self.number = number

    @property
    def name(self) -> str:
        """The signal as people call it."""
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name


class UserCodeError(RuntimeError):
    """Code of the user's failed: a reward, a schedule, a listener. The message names it, with file and line."""
