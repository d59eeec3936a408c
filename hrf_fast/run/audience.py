"""Audience: everybody who hears of a run on the main rank.

A writer that fails is dropped, since a service may be away; a user's listener that fails ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hrf_fast.run.listeners import Listener
from hrf_fast.run.progress import Progress
from hrf_fast.run.writers import Writer
from hrf_fast.user_code import note_of, user_code


class Audience:
    """Writers, the user's listeners and the display, told in this order: a line that is shown has been written."""

    def __init__(
        self, listeners: Sequence[Listener], progress: Progress, note_once: Callable[[str, str], None]
    ) -> None:
        """`note_once` shows a line, unless one of its key was shown before."""
        self._listeners, self._progress, self._note_once = list(listeners), progress, note_once
        self._writers: list[Writer] = []
        self._begun = False

    def begin(self, writers: Sequence[Writer]) -> None:
        """Add the writers, and show the run on the display from here on."""
        self._writers, self._begun = list(writers), True

    def tell(self, event: str, *arguments: Any) -> str | None:
        """Call the method `event` of everybody; returns the first reason to end the run.

        Raises:
            UserCodeError: a listener of the user's failed.
        """
        for writer in tuple(self._writers):
            self._write(writer, event, arguments)
        reasons = [self._hear(listener, event, arguments) for listener in self._listeners]
        if self._begun:
            getattr(self._progress, event)(*arguments)
        return next((reason for reason in reasons if reason), None)

    def finish(self, reason: str, *, failing: bool) -> None:
        """Tell everybody why the run has ended, also those after one that fails.

        Args:
            failing: an error ends the run already, which that of a listener must not hide.

        Raises:
            UserCodeError: a listener of the user's failed.
        """
        for writer in tuple(self._writers):
            self._write(writer, "finished", (reason,))
        failures = []
        for listener in self._listeners:
            try:
                self._hear(listener, "finished", (reason,))
            except Exception as error:
                failures.append(error)
        if self._begun:
            self._progress.finished(reason)
        for failure in failures if failing else failures[1:]:
            self._progress.note(str(failure))
        if failures and not failing:
            raise failures[0]

    def _hear(self, listener: Listener, event: str, arguments: tuple[Any, ...]) -> str | None:
        what = f"listener {type(listener).__name__}"
        with user_code(what) as changes:
            reason: str | None = getattr(listener, event)(*arguments)
            if event != "finished" and not isinstance(reason, str | None):
                raise TypeError(f"{event}() returned {reason!r}; return a reason to end the run as a str, or None")
        if changes:
            self._note_once(note_of(what, changes), what)
        return reason

    def _write(self, writer: Writer, event: str, arguments: tuple[Any, ...]) -> None:
        try:
            getattr(writer, event)(*arguments)
        # of a service that is away, or of its package: what a run has learnt does not depend on it
        except Exception as error:
            self._writers.remove(writer)
            self._progress.note(
                f"run.writers: {writer.name} failed ({type(error).__name__}: {error}) and gets nothing more; the run "
                "goes on, and metrics.jsonl and evaluations.jsonl have every number"
            )
