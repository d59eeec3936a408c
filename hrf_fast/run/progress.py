"""Progress: what a run shows on the terminal, and where what user code prints goes meanwhile."""

from __future__ import annotations

import errno
import io
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from torch import Tensor
from tqdm import tqdm

from hrf_fast.run.files import intervals_of
from hrf_fast.run.listeners import Listener


@contextmanager
def outliving_terminal() -> Iterator[None]:
    """A block that prints: a run that was left in the background goes on when its terminal is closed."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


class Progress(Listener):
    """Shows notes only: the quiet display, and the interface of the others."""

    _unit = "iterations"

    @property
    def prints(self) -> TextIO:
        """Standard output for everybody else while the run is shown."""
        return sys.stdout

    def start(self, unit: str, first: int, total: int) -> None:
        """The run ends when the record's `unit` (iterations or evaluations), now at `first`, has reached `total`."""

    def reached(self, record: dict[str, Any]) -> int:
        """How far a record has come, in `unit`."""
        return record["evaluations"] if self._unit == "evaluations" else record["iteration"] + 1

    def phase(self, name: str) -> None:
        """The iteration enters a phase."""

    def note(self, text: str) -> None:
        """A line that a user must see."""
        with outliving_terminal():
            print(text, file=sys.stderr, flush=True)


class Silence(Progress):
    """Silent display of all ranks but the main one, whose output another rank's print must not mix with."""

    @property
    def prints(self) -> TextIO:
        return sys.stderr

    def note(self, text: str) -> None: ...


class JsonProgress(Progress):
    """One JSON line per event on standard output, for logs; what else is printed goes to standard error."""

    def __init__(self) -> None:
        self._out = sys.stdout
        # what an estimate needs: when the run was started, at how much and of how much
        self._started: tuple[float, int, int] | None = None

    @property
    def prints(self) -> TextIO:
        return sys.stderr

    def start(self, unit: str, first: int, total: int) -> None:
        self._unit, self._started = unit, (time.perf_counter(), first, total)

    def iteration(self, record: dict[str, Any]) -> None:
        self._line(record | self._times(record))

    def panel(self, record: dict[str, Any], images: Tensor) -> None:
        self._line({"panel": {k: v for k, v in record.items() if k not in ("rewards", "prompts", "attributes")}})

    def note(self, text: str) -> None:
        self._line({"note": text})

    def _line(self, record: dict[str, Any]) -> None:
        with outliving_terminal():
            print(json.dumps(record), file=self._out, flush=True)

    def _times(self, record: dict[str, Any]) -> dict[str, float]:
        """Seconds since the start of this process's share, and seconds left at its mean speed, panels included."""
        if self._started is None:
            return {}
        began, first, total = self._started
        elapsed, reached = time.perf_counter() - began, self.reached(record)
        left = elapsed / (reached - first) * max(total - reached, 0)
        return {"elapsed_seconds": round(elapsed, 1), "seconds_left": round(left, 1)}


class _AboveBar(io.TextIOBase):
    """A stream whose lines scroll above the bar."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._line = stream, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        with outliving_terminal():
            for line in lines:
                tqdm.write(line, file=self._stream)
        return len(text)

    def fileno(self) -> int:
        return self._stream.fileno()

    def finish(self) -> None:
        """Write a last line that has no end."""
        if self._line:
            self.write("\n")


class BarProgress(Progress):
    """A tqdm bar with reward, images/s and the time left; panels and notes scroll above it."""

    _bar: tqdm | None = None

    def __init__(self) -> None:
        self._above = _AboveBar(sys.stdout)

    @property
    def prints(self) -> TextIO:
        return self._above  # type: ignore[return-value]

    def start(self, unit: str, first: int, total: int) -> None:
        self._unit = unit
        self._bar = tqdm(
            total=total, initial=first, unit=f" {unit}", dynamic_ncols=True, unit_scale=True, smoothing=0.1
        )

    def phase(self, name: str) -> None:
        if self._bar is not None:
            self._bar.set_description(f"{name:>8}")

    def iteration(self, record: dict[str, Any]) -> None:
        if self._bar is not None:
            rate, overhead = (record["speed"][name] for name in ("images_per_second", "overhead"))
            postfix = f"reward {record['reward_mean']:.4f}, {rate:.1f} images/s, {overhead:.2f}x its UNet calls"
            self._bar.set_postfix_str(postfix, refresh=False)
            # never past the total: the last iteration may overshoot its budget
            self._bar.update(min(self.reached(record), self._bar.total) - self._bar.n)

    def panel(self, record: dict[str, Any], images: Tensor) -> None:
        parts = [
            f"{name} {value:.4g} [{low:.4g}, {high:.4g}]" for name, (value, low, high) in intervals_of(record).items()
        ]
        shares = record.get("kept", {})
        parts += [f"{name} kept {share:.1%} [{low:.1%}, {high:.1%}]" for name, (share, low, high) in shares.items()]
        self.note(f"panel after {record['iteration']} iterations: " + "   ".join(parts))

    def note(self, text: str) -> None:
        with outliving_terminal():
            tqdm.write(text, file=sys.stderr)

    def finished(self, reason: str) -> None:
        self._above.finish()
        if self._bar is not None:
            self._bar.close()


def build_progress(kind: str) -> Progress:
    """The display of run.progress: auto is a bar on a terminal and JSON lines elsewhere."""
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() else "json"
    return {"bar": BarProgress, "json": JsonProgress, "quiet": Progress}[kind]()
