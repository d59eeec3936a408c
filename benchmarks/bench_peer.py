"""Our runs beside NanoFlow's at an equal drop of bits per pixel: side by side, not a race.

    hrf bench peer runs/ddpo runs/hrf
    hrf bench peer runs/* --drop 0.174 --out benchmarks/results

Reads run folders of a reward on JPEG size; nothing is sampled again. Each panel's first 64 images are in its grid, as
many as NanoFlow's fixed comparison has. A row is where a run's mean bits per pixel have first fallen by the share
`--drop` of the pretrained model's, linear between panels; a run that never does has the row of its lowest panel.

NanoFlow's model is another (a flow-matching UNet conditioned on a class, 28×28, other data split, Flow-GRPO), its total
variation and duplicates are defined in code that is not published with its figures, and its accuracy is of the class
that was asked for; docs/results/peers.md says what can be compared. Writes peer.json and peer.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.tables import markdown_table
from hrf_fast.evaluation.nanoflow import COLUMNS, nanoflow_columns
from hrf_fast.evaluation.panel import choose_network
from hrf_fast.report.comparison import RunLog, read_runs
from hrf_fast.report.strip import grid_images
from hrf_fast.report.tables import run_title

DROP = 0.203
"""NanoFlow's longest run: 6.2736 to 4.9990 bits per pixel."""
# experiments/jpeg_compression_grpo/experiment.md at commit 34adae6, 64 samples each; accuracy stands for consistency
NANOFLOW: dict[str, dict[str, float]] = {
    "NanoFlow, pretrained": {
        **{"jpeg_bpp": 6.2736, "png_bpp": 5.3020, "total_variation": 0.3292, "duplicates": 0.0},
        "consistency": 0.9531,
    },
    "NanoFlow, 30 epochs": {"jpeg_bpp": 6.1787, "consistency": 0.9531},
    "NanoFlow, 100 epochs": {"jpeg_bpp": 5.1805, "png_bpp": 2.3787, "duplicates": 0.0781, "consistency": 0.5938},
    "NanoFlow, 300 epochs": {
        **{"jpeg_bpp": 4.9990, "png_bpp": 2.6207, "total_variation": 0.1556, "duplicates": 0.1563},
        "consistency": 0.6094,
    },
}
TITLES = {
    "jpeg_bpp": "JPEG bits per pixel",
    "png_bpp": "PNG bits per pixel",
    "total_variation": "total variation",
    "duplicates": "duplicates",
    "confidence": "confidence",
    "consistency": "consistency or accuracy",
}


def panel_images(log: RunLog, panel: int) -> Tensor:
    """`grid_images` as [N, 3, H, W] in [0, 1]."""
    pixels = np.stack([np.asarray(image) for image in grid_images(log, panel)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def enlargement(images: Tensor) -> int:
    """The factor by which a grid shows its images [N, 3, H, W], each pixel as a square of equal ones."""
    for factor in range(images.shape[-1], 1, -1):
        if images.shape[-1] % factor == 0 and images.shape[-2] % factor == 0:
            corner = images[..., ::factor, ::factor]
            if torch.equal(corner.repeat_interleave(factor, 2).repeat_interleave(factor, 3), images):
                return factor
    return 1


def panels_of(log: RunLog) -> list[dict[str, list[float]]]:
    """The columns of every panel of a run, the pretrained model's first."""
    network = choose_network(log.config.evaluation.network, log.config.model.name, torch.device("cpu"))
    grids = [panel_images(log, i) for i in range(len(log.panels))]
    # the pretrained model's: later images may be of one colour
    factor = enlargement(grids[0])
    panels = [images[..., ::factor, ::factor] for images in grids]
    return [nanoflow_columns(images, panels[0], network, seed=log.config.evaluation.seed) for images in panels]


def at_drop(panels: Sequence[Mapping[str, Sequence[float]]], drop: float) -> tuple[dict[str, list[float]], bool]:
    """The columns where bits per pixel have first fallen by a share, and whether they have; else of the lowest panel.

    Linear between two panels along the bits per pixel, the ends of the intervals likewise.
    """
    bits = [panel["jpeg_bpp"][0] for panel in panels]
    level = (1 - drop) * bits[0]
    after = next((i for i, value in enumerate(bits) if value <= level), None)
    if after is None or after == 0:
        return {name: list(values) for name, values in panels[bits.index(min(bits))].items()}, after == 0
    share = (bits[after - 1] - level) / (bits[after - 1] - bits[after])
    one, two = panels[after - 1], panels[after]
    return {
        name: [(1 - share) * a + share * b for a, b in zip(one[name], two[name], strict=True)] for name in one
    }, True


def compare(logs: Sequence[RunLog], drop: float) -> list[dict[str, Any]]:
    """A row of numbers for the pretrained model and for each run at the drop."""
    rows: list[dict[str, Any]] = []
    for log in logs:
        panels = panels_of(log)
        if not rows:
            rows.append({"name": f"{log.config.model.name}, pretrained", "columns": panels[0]})
        columns, reached = at_drop(panels, drop)
        title = run_title(log) if reached else f"{run_title(log)}, its lowest"
        rows.append({"name": title, "seed": log.config.run.seed, "reached": reached, "columns": columns})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table, NanoFlow's rows last."""
    first = rows[0]["columns"]["jpeg_bpp"][0]
    lines = [
        [row["name"], _drop(row["columns"]["jpeg_bpp"][0], first), *(_cell(row["columns"].get(c)) for c in COLUMNS)]
        for row in rows
    ]
    base = NANOFLOW["NanoFlow, pretrained"]["jpeg_bpp"]
    lines += [
        [name, _drop(peer["jpeg_bpp"], base), *(_cell([peer[c]] if c in peer else None) for c in COLUMNS)]
        for name, peer in NANOFLOW.items()
    ]
    return markdown_table(["", "drop", *(TITLES[column] for column in COLUMNS)], lines)


def _drop(value: float, first: float) -> str:
    return f"{100 * (1 - value / first):.1f} %"


def _cell(values: Sequence[float] | None) -> str:
    if values is None:
        return ""
    value, *interval = (f"{number:.3f}" for number in values)
    return f"{value} [{', '.join(interval)}]" if interval else value


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: a drop that is no share.
    """
    parser = argparse.ArgumentParser(
        prog="hrf bench peer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders that started from one model")
    parser.add_argument("--drop", type=float, default=DROP, help="share of the pretrained model's bits per pixel")
    parser.add_argument("--out", type=Path, default=Path("runs/peer"), help="folder of peer.json and peer.md")
    arguments = parser.parse_args(words)
    if not 0 < arguments.drop < 1:
        raise ValueError(f"--drop is {arguments.drop:g}; use a share above 0 and under 1, such as {DROP}")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Compare the runs and print the table.

    Raises:
        ValueError: no run, runs that can't be compared, or what `parse` refuses.
    """
    arguments = parse(words)
    rows = compare(read_runs(arguments.runs), arguments.drop)
    page = table(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"drop": arguments.drop, "rows": rows, "nanoflow": NANOFLOW}
    (arguments.out / "peer.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "peer.md").write_text(f"{page}\n")
    print(page)
