"""Progress: what a run shows on the terminal."""

from __future__ import annotations

import json
import sys
from typing import Any

from torch import Tensor
from tqdm import tqdm

from hrf_fast.run.listeners import Listener


class Progress(Listener):
    """Shows notes only: the quiet display, and the interface of the others."""

    def start(self, unit: str, first: int, total: int) -> None:
        """The run ends when the record's `unit` (iterations or evaluations), now at `first`, has reached `total`."""

    def phase(self, name: str) -> None:
        """The iteration enters a phase."""

    def note(self, text: str) -> None:
        """A line that a user must see."""
        print(text, file=sys.stderr, flush=True)


class Silence(Progress):
    """Silent display of all ranks but the main one."""

    def note(self, text: str) -> None: ...


class JsonProgress(Progress):
    """One JSON line per event on standard output, for logs."""

    def iteration(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), flush=True)

    def panel(self, record: dict[str, Any], images: Tensor) -> None:
        print(json.dumps({"panel": {k: v for k, v in record.items() if k != "rewards"}}), flush=True)

    def note(self, text: str) -> None:
        print(json.dumps({"note": text}), flush=True)


class BarProgress(Progress):
    """A tqdm bar with reward, images/s and the time left; panels and notes scroll above it."""

    _bar: tqdm | None = None
    _unit = "iterations"

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
            reached = record["evaluations"] if self._unit == "evaluations" else record["iteration"] + 1
            self._bar.update(min(reached, self._bar.total) - self._bar.n)

    def panel(self, record: dict[str, Any], images: Tensor) -> None:
        parts = [
            f"{name} {record[name][0]:.4g} [{record[name][1]:.4g}, {record[name][2]:.4g}]"
            for name in ("reward", "vendi", "inception")
            if name in record
        ]
        self.note(f"panel after {record['iteration']} iterations: " + "   ".join(parts))

    def note(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def finished(self, reason: str) -> None:
        if self._bar is not None:
            self._bar.close()


def build_progress(kind: str) -> Progress:
    """The display of run.progress: auto is a bar on a terminal and JSON lines elsewhere."""
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() else "json"
    return {"bar": BarProgress, "json": JsonProgress, "quiet": Progress}[kind]()
