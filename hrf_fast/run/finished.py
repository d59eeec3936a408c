"""Finished runs: folders whose tuned model a command may use."""

from __future__ import annotations

from pathlib import Path

from hrf_fast.run.layout import RunFiles


def existing_run(run: Path) -> RunFiles:
    """The files of a run's folder.

    Raises:
        ValueError: not a run folder.
    """
    files = RunFiles(run)
    if not files.config_file.is_file():
        raise ValueError(f"{run} is not a run folder: it has no config.yaml; give one that `hrf train` wrote")
    return files


def finished_run(run: Path) -> RunFiles:
    """The files of a run whose training has finished.

    Raises:
        ValueError: not a run folder, one without a tuned model yet, or one that has gone on since it was saved.
    """
    files = existing_run(run)
    if not files.model.is_dir():
        raise ValueError(f"{run} has no model/ yet; let its training finish (the same `hrf train` command resumes it)")
    lines, ends = files.metrics(), files.ends()
    if lines and ends and ends[-1]["iteration"] != lines[-1]["iteration"] + 1:
        raise ValueError(
            f"{run} has gone on to iteration {lines[-1]['iteration'] + 1} since its model/ was saved after "
            f"{ends[-1]['iteration']}; let its training finish (the same `hrf train` command resumes it)"
        )
    return files
