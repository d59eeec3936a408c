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
    lines, ends = read_log(run / "metrics.jsonl"), ends_of(run)
    if lines and ends and ends[-1]["iteration"] != lines[-1]["iteration"] + 1:
        raise ValueError(
            f"{run} has gone on to iteration {lines[-1]['iteration'] + 1} since its model/ was saved after "
            f"{ends[-1]['iteration']}; let its training finish (the same `hrf train` command resumes it)"
        )
    return run


def model_iteration(run: Path) -> int:
    """After how many iterations a finished run's tuned model is."""
    ends = ends_of(run)
    return int(ends[-1]["figures"]["model"] if ends else read_log(run / "evaluations.jsonl", PANEL)[-1]["iteration"])


def ends_of(run: Path) -> list[dict[str, Any]]:
    """The events of a run's ends, the last one of the newest; their figures say which iteration the tuned model is of.

    Raises:
        ValueError: a damaged file, by its path.
    """
    ends = [event for event in read_log(run / "events.jsonl", EVENT) if event["event"] == "end"]
    if any("model" not in end["figures"] for end in ends):
        raise ValueError(f"{run / 'events.jsonl'} has an end whose figures lack 'model'; mend or delete that line")
    return ends
