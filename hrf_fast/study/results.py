"""Results: a file of JSON lines, one for each finished run and each choice of a learning rate; nothing is overwritten.

A line says which code and which configuration it is of. Lines of other code or of another configuration stay in the
file and are named, never used silently; a half-written line is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

import hrf_fast.version
from hrf_fast.cpu import cpu_name
from hrf_fast.run.files import PANEL, append_line, check_record
from hrf_fast.study.plan import Job

# what trains; the study and the report only read what training wrote
_CODE = ("hrf_fast", "kernels", ":(exclude)hrf_fast/study", ":(exclude)hrf_fast/report")
Key = tuple[str, str, int, float]
_NUMBER = (int, float)
_RUN: dict[str, Any] = {
    "case": str,
    "arm": str,
    "seed": int,
    "learning_rate": _NUMBER,
    "configuration": str,
    "commit": str,
}
_MACHINE = {"cores", "processor", "gpu", "torch"}
_WHOLE: dict[str, Any] = {**_RUN, "machine": dict, "date": str, "seconds": _NUMBER, "reason": str, "panels": list}
# a path is made of Vendi Scores; rewards of single images are in some panels only
_PANEL = {**PANEL, "rewards": "list of numbers?", "vendi": "interval"}
_CHOICE: dict[str, Any] = {"case": str, "arm": str, "learning_rate": _NUMBER, "choice": dict, "commit": str}


def code_commit() -> str:
    """The last commit that changed the code that trains, with a hash of what differs from it; the version without git.

    Files that git does not know are not seen.
    """
    root = Path(hrf_fast.version.__file__).parents[1]
    commit = _git(root, "log", "-1", "--abbrev=12", "--format=%h", "--", *_CODE).decode().strip()
    if not commit:
        return f"version-{hrf_fast.version.__version__}"
    changes = _git(root, "diff", "HEAD", "--", *_CODE)
    return f"{commit}-dirty-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else commit


def _git(root: Path, *words: str) -> bytes:
    try:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True).stdout
    except FileNotFoundError:
        return b""


def facts(job: Job, commit: str) -> dict[str, Any]:
    """Describe a run as its line does, but for the outcome."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"cores": os.cpu_count(), "processor": cpu_name(), "gpu": gpu, "torch": torch.__version__}
    return {
        "case": job.case,
        "arm": job.arm,
        "seed": job.seed,
        "learning_rate": job.learning_rate,
        "configuration": job.configuration,
        "commit": commit,
        "machine": machine,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class Results:
    """The file of a study's lines; several processes may append to it."""

    def __init__(self, path: Path) -> None:
        """Open a file; its report and plot are beside it, under its name.

        Raises:
            ValueError: it has the name of the report or of the plot.
        """
        if path.suffix in (".md", ".png"):
            raise ValueError(f"--results is {path}, where the report or its plot goes; use a name with .jsonl")
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Add a line, as `append_line` does.

        Raises:
            NotWritten: the disk is full or unwritable.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            append_line(self.path, json.dumps(record))

    def read(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The lines in order, and a note for each that is no record of a study.

        Raises:
            ValueError: the path is a folder.
        """
        if self.path.is_dir():
            raise ValueError(f"--results is {self.path}, a folder; use a file, such as {self.path / 'lines.jsonl'}")
        records, notes = [], []
        text = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(text.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                kinds = _CHOICE if "choice" in record else _RUN if "error" in record else _WHOLE
                if not all(isinstance(record[name], kind) for name, kind in kinds.items()):
                    raise TypeError(f"not all of {', '.join(kinds)}")
                if kinds is _WHOLE:
                    if not record["machine"].keys() >= _MACHINE:
                        raise ValueError(f"its machine lacks one of {', '.join(sorted(_MACHINE))}")
                    check_panels(record)
                records.append(record)
            except (ValueError, TypeError, AttributeError, LookupError) as error:
                notes.append(
                    f"{self.path}, line {number} is half-written or no record of a study: it is ignored ({error})"
                )
        return records, notes


def check_panels(record: Mapping[str, Any]) -> None:
    """Raise ValueError, TypeError or LookupError where a line's panels lack what a path is made of."""
    panels, second = record["panels"], record.get("second_panel", [])
    for panel in [*panels, *second]:
        check_record(panel, _PANEL)
    # shares are of the first panel's, and of blends on the second panel of that one's first
    scores = ("vendi", "inception", "vendi_per_prompt", "looks")
    if any(panel.get(name, [1])[0] <= 0 for panel in [panels[0], *second[:1]] for name in scores):
        raise ValueError(f"a first panel has one of {', '.join(scores)} at 0 or less")
    model, of_blends = record.get("model", panels[-1]["iteration"]), "alpha" in record
    if model not in [panel["iteration"] for panel in panels]:
        raise ValueError(f"no panel is of iteration {model}, which the tuned model is of")
    if of_blends and len(second) != 2:
        raise ValueError(f"a blend has 2 second panels, and here are {len(second)}")
    if of_blends and record["alpha"] not in [panel["alpha"] for panel in panels]:
        raise ValueError(f"no panel is of the chosen alpha, {record['alpha']:g}")


def key(record: dict[str, Any] | Job) -> Key:
    """Case, arm, seed and learning rate of a line or a run."""
    if isinstance(record, Job):
        return record.case, record.arm, record.seed, record.learning_rate
    return record["case"], record["arm"], record["seed"], record["learning_rate"]


def select(
    records: Sequence[dict[str, Any]], jobs: Sequence[Job], commits: Collection[str]
) -> tuple[dict[Key, dict[str, Any]], list[str]]:
    """The line of each run: its first whole one, else its last failure.

    Args:
        commits: whose lines count.

    Returns:
        Lines by `key`, and a note for each kind of line that was kept apart.
    """
    wanted = {key(job): job.configuration for job in jobs}
    lines: dict[Key, dict[str, Any]] = {}
    apart: Counter[str] = Counter()
    for record in records:
        if "choice" in record or key(record) not in wanted:
            continue
        if record["configuration"] != wanted[key(record)]:
            apart["of another configuration"] += 1
        elif others := {record["commit"], record.get("run_commit", record["commit"])} - set(commits):
            # of blends, that of their run too
            apart[f"of commit {', '.join(sorted(others))} (--also-commit counts those of a commit)"] += 1
        elif "error" in lines.get(key(record), {"error": ""}):
            lines[key(record)] = record
    return lines, [f"{count} lines {what} are kept apart" for what, count in apart.items()]
