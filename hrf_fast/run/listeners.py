"""Listener: hears what a run does. Writers, the progress display, rules that end a run and tests are listeners."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Listener:
    """Does nothing: subclass and override what you want to hear. A run calls its listeners on the main rank only.

    An `iteration` or `panel` that returns a string ends the run on all ranks, for that reason; an exception ends the
    run with a UserCodeError that says where, after a checkpoint.
    """

    def iteration(self, record: dict[str, Any]) -> str | None:
        """Hear of a finished iteration; `record` is its line of metrics.jsonl."""
        return None

    def panel(self, record: dict[str, Any], images: Tensor) -> str | None:
        """Hear of an evaluated panel.

        Args:
            record: its line of evaluations.jsonl; images: the first of the panel, [N, 3, H, W] in [0, 1], on the CPU.
        """
        return None

    def finished(self, reason: str) -> None:
        """Hear why the run has ended, also by an error; called once, at the very end."""


def check_listeners(listeners: Any) -> list[Listener]:
    """The listeners as a list.

    Raises:
        TypeError: they are no sequence, or one is a class or lacks a method of `Listener`.
    """
    if not isinstance(listeners, Iterable):
        raise TypeError(f"listeners is {listeners!r}; pass a list of them")
    listeners = list(listeners)
    for listener in listeners:
        if isinstance(listener, type):
            raise TypeError(f"listener {listener.__name__} is a class; pass an object of it, {listener.__name__}()")
        missing = [name for name in ("iteration", "panel", "finished") if not callable(getattr(listener, name, None))]
        if missing:
            raise TypeError(
                f"listener {listener!r} lacks {', '.join(missing)}; subclass hrf_fast.Listener, which has all three"
            )
    return listeners
