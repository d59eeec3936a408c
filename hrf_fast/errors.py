"""Errors that every layer knows."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Windows has no SIGHUP, and only Windows has Ctrl-Break, by which a parent asks a child to stop
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Signals that ask a program to stop."""
_FULL = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and the run has stopped where its weights could be saved."""

    def __init__(self, number: int) -> None:
        """`number` is the signal's."""
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {self.name}; the same call resumes the run"

    @property
    def name(self) -> str:
        """The signal as people call it."""
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name


class NotWritten(OSError):
    """A file or folder could not be written: the message names it and the way out, `errno` says why."""


class UserCodeError(RuntimeError):
    """Code of the user's failed: a reward, a schedule, a listener. The message names it, with file and line."""


def read_utf8(path: Path, instead: str = "") -> str:
    """The text of a file of the user's, without the mark that editors of Windows begin one with.

    Args:
        instead: another way out than to mend the file, for errors.

    Raises:
        ValueError: the file is not UTF-8, or can't be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        way_out = "save it as UTF-8" + (f", or {instead}" if instead else "")
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); {way_out}") from error
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}" + (f"; {instead}" if instead else "")) from error


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around what writes `path`: an error of the system, which may name no file, names it and the way out.

    Raises:
        NotWritten: instead of an OSError.
    """
    try:
        yield
    except NotWritten:
        # something inside knows better
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        full = error.errno in _FULL or os.strerror(errno.ENOSPC) in reason
        way_out = "free space" if full else "mend that"
        raised = NotWritten(f"{Path(path)} can't be written: {reason}; {way_out}, then the same command goes on")
        raised.errno = errno.ENOSPC if full else error.errno
        raise raised from error
