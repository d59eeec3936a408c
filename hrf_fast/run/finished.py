"""Finished runs: what their folders say of the tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hrf_fast.run.files import EVENT, PANEL, read_log


def finished_run(run: Path) -> Path:
    """The run folder, if its training has finished.

    Raises:
        ValueError: not a run folder, one without a tuned model yet, or one that has gone on since it was saved.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is not a run folder: it has no config.yaml; give one that `hrf train` wrote")
    if not (run / "model").is_dir():
        raise ValueError(f"{run} has no model/ yet; let its training finish (the same `hrf train` command resumes it)")
    lines, ends = read_log(run / "metrics.jsonl"), _ends(run)
    if lines and ends and ends[-1]["iteration"] != lines[-1]["iteration"] + 1:
        raise ValueError(
            f"{run} has gone on to iteration {lines[-1]['iteration'] + 1} since its model/ was saved after "
            f"{ends[-1]['iteration']}; let its training finish (the same `hrf train` command resumes it)"
        )
    return run


def model_iteration(run: Path) -> int:
    """After how many iterations a finished run's tuned model is."""
    ends = _ends(run)
    return int(ends[-1]["figures"]["model"] if ends else read_log(run / "evaluations.jsonl", PANEL)[-1]["iteration"])


def _ends(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_log(run / "events.jsonl", EVENT) if event["event"] == "end"]
