"""Layout: where the files of a run's folder are, and how its logs read. `RunFolder` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hrf_fast.config.load import load_config
from hrf_fast.config.options import Config
from hrf_fast.run.files import EVENT, PANEL, read_log

CONFIG, METRICS, EVALUATIONS, EVENTS = "config.yaml", "metrics.jsonl", "evaluations.jsonl", "events.jsonl"


class RunFiles:
    """The files of one run, which need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / CONFIG
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.blend = path / "blend"

    def read_config(self, words: Sequence[str] = ()) -> Config:
        """The run's configuration with options changed by `words`; see `load_config`."""
        return load_config(["--config", str(self.config_file), *words])

    def metrics(self, needs: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; see `read_log`."""
        return read_log(self.path / METRICS, needs)

    def panels(self) -> list[dict[str, Any]]:
        """The lines of evaluations.jsonl."""
        return read_log(self.path / EVALUATIONS, PANEL)

    def events(self) -> list[dict[str, Any]]:
        """The lines of events.jsonl."""
        return read_log(self.path / EVENTS, EVENT)

    def ends(self) -> list[dict[str, Any]]:
        """The events of the run's ends, the last one of the newest; their figures say of which iteration the tuned
        model is.

        Raises:
            ValueError: a damaged file, by its path.
        """
        ends = [event for event in self.events() if event["event"] == "end"]
        if any("model" not in end["figures"] for end in ends):
            raise ValueError(f"{self.path / EVENTS} has an end whose figures lack 'model'; mend or delete that line")
        return ends

    def grid(self, iteration: int) -> Path:
        """The PNG grid of the panel after `iteration` iterations."""
        return self.path / "samples" / f"iteration-{iteration:06d}.png"

    def evaluation(self, checkpoint: Path | None = None) -> Path:
        """The file that `hrf evaluate` writes about the tuned model, or about a checkpoint, without --out."""
        number = "" if checkpoint is None else f"-{checkpoint.absolute().name.removeprefix('iteration-')}"
        return self.path / f"evaluation{number}.json"

    def model_iteration(self) -> int:
        """After how many iterations a finished run's tuned model is."""
        ends = self.ends()
        return int(ends[-1]["figures"]["model"] if ends else self.panels()[-1]["iteration"])
