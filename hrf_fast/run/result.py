"""RunResult: what `hrf_fast.train` returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """Results of a finished run."""

    folder: Path
    """config.yaml, metrics.jsonl, evaluations.jsonl, samples/, checkpoints/ and model/, the tuned model."""
    reason: str
    """Why the run ended: its budget, a rule of `stop` or a listener."""
    panel: dict[str, Any]
    """Line of evaluations.jsonl of the tuned model, which is an earlier one than the last where that was restored."""
    last_panel: dict[str, Any]
    """The line after the last iteration."""
    best_panel: dict[str, Any]
    """The line with the highest mean reward above the floors of `stop`."""
