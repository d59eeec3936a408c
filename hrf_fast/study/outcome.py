"""Outcome: what a finished run, or the blends of one, has left in its folder, as its line of the results keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hrf_fast.evaluation.blend import read_front, steps_to
from hrf_fast.run.files import read_object
from hrf_fast.run.layout import EVENTS, RunFiles
from hrf_fast.study.plan import BlendOf


def trained(folder: Path) -> dict[str, Any]:
    """Seconds, reason of the end, iteration of the tuned model, and panels.

    Raises:
        ValueError: the events have no end, or a damaged file.
    """
    files = RunFiles(folder)
    ends = files.ends()
    if not ends:
        raise ValueError(f"{folder / EVENTS} has no end of the run; delete {folder}, and the run is made again")
    reason, model = ends[-1]["text"], int(ends[-1]["figures"]["model"])
    panels, seconds = files.panels(), _seconds(files)
    for number, panel in enumerate(panels):
        before = [value for iteration, value in seconds.items() if iteration < panel["iteration"]]
        # of training before it; a log that has lost lines does not know them
        if len(before) == panel["iteration"]:
            panel["seconds"] = round(sum(before), 1)
        panel.pop("prompts", None)
        # for gains that are paired image by image
        if 0 < number < len(panels) - 1 and panel["iteration"] != model:
            del panel["rewards"]
    return {"seconds": round(sum(seconds.values()), 1), "reason": reason, "model": model, "panels": panels}


def blended(folder: Path, blend: BlendOf) -> dict[str, Any]:
    """Seconds, reason, iteration of the tuned model, panels along α, `alpha`, the chosen one, and `second_panel`.

    Each panel has the evaluations of the run until its end. The second panel, which did not choose, has the pretrained
    model and the chosen blend.

    Raises:
        ValueError: a damaged file.
        KeyError: an α is missing, as where somebody else has blended the run meanwhile.
    """
    files = RunFiles(folder)
    chosen = read_object(files.blend / "blend.json", "delete it, and the blend is made again")
    records = read_front(files.blend / "front.jsonl")
    alphas = steps_to(blend.most, blend.step)
    evaluations = files.panels()[-1]["evaluations"]
    model, seconds = files.model_iteration(), round(sum(_seconds(files).values()), 1)

    def panel(record: dict[str, Any]) -> dict[str, Any]:
        figures = {name: value for name, value in record.items() if name not in ("prompts", "rewards")}
        # for gains that are paired image by image
        rewards = {"rewards": record["rewards"]} if record["alpha"] in (0, chosen["alpha"]) else {}
        iteration = model if record["alpha"] else 0
        return {**figures, **rewards, "iteration": iteration, "evaluations": evaluations, "seconds": seconds}

    first = {record["alpha"]: record for record in records if record["seed"] == records[0]["seed"]}
    other = {record["alpha"]: record for record in records if record["seed"] != records[0]["seed"]}
    return {
        "seconds": seconds,
        "reason": f"alpha {chosen['alpha']:g} of {folder.name} chosen",
        "model": model if chosen["alpha"] else 0,
        "alpha": chosen["alpha"],
        "panels": [panel(first[alpha]) for alpha in sorted(alphas)],
        "second_panel": [panel(other[alpha]) for alpha in (0, chosen["alpha"])],
    }


def _seconds(files: RunFiles) -> dict[int, float]:
    """Seconds by iteration, without panels and checkpoints."""
    return {line["iteration"]: float(sum(line["seconds"].values())) for line in files.metrics()}
