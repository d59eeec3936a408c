"""Strip: the first images of the pretrained panel and of each run's last panel, one labelled row each.

Images of a column start from equal noise. They are cut from the grids in samples/; nothing is sampled again.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from hrf_fast.evaluation.grids import SHOWN, Grid, captions_of, read_grid
from hrf_fast.report.comparison import RunLog, read_runs
from hrf_fast.report.tables import run_title
from hrf_fast.run.files import write_atomically
from hrf_fast.run.layout import RunFiles

IMAGES = 10
# smaller images are enlarged to about this, so that they stay sharp on a dense display
CELL = 128
FONT_SIZE, PADDING, GAP = 26, 16, 8


class Row(NamedTuple):
    """A panel's first images and what is written beside them."""

    lines: list[str]
    images: list[Image.Image]


def write_strip(runs: Sequence[Path], out: Path, *, names: Sequence[str] = ()) -> Path:
    """Write the strip of `runs` as PNG; the iteration-0 panel of the first run is the pretrained model's.

    Args:
        names: of the runs, as in `read_runs`.

    Returns:
        The file written.

    Raises:
        ValueError: a folder lacks a grid, or as `read_runs`.
    """
    logs = read_runs(runs, names)
    rows = [
        _row(logs[0], 0, "pretrained"),
        *(_row(log, log.model, run_title(log)) for log in logs if len(log.panels) > 1),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    draw_strip(rows).save(buffer, format="png")
    write_atomically(out, buffer.getvalue())
    return out


def draw_strip(rows: Sequence[Row]) -> Image.Image:
    """Rows of images of one size below each other, each with its lines of text at the left."""
    width, height = rows[0].images[0].size
    scale = max(1, CELL // width)
    width, height = width * scale, height * scale
    font = ImageFont.load_default(FONT_SIZE)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    labels = ["\n".join(row.lines) for row in rows]
    text = max(round(measure.multiline_textbbox((0, 0), label, font)[2]) for label in labels) + 2 * PADDING
    columns = max(len(row.images) for row in rows)
    strip = Image.new("RGB", (text + columns * width, len(rows) * (height + GAP) - GAP), "white")
    draw = ImageDraw.Draw(strip)
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = number * (height + GAP)
        draw.multiline_text((PADDING, top + height / 2), label, fill="#1a1a1a", font=font, anchor="lm")
        for column, image in enumerate(row.images):
            strip.paste(image.resize((width, height), Image.Resampling.NEAREST), (text + column * width, top))
    return strip


def open_grid(log: RunLog, panel: int) -> Image.Image:
    """A panel's grid.

    Raises:
        ValueError: the grid is not there, or damaged.
    """
    path = RunFiles(log.folder).grid(log.panels[panel]["iteration"])
    try:
        return read_grid(path)
    except OSError as error:
        raise ValueError(f"{log.folder} lacks a grid, {path}: {error}; copy the whole run folder") from error


def grid_images(log: RunLog, panel: int) -> list[Image.Image]:
    """The images of a panel's grid, at most SHOWN, as large as they are there.

    Raises:
        ValueError: see `open_grid`.
    """
    layout = Grid(
        min(SHOWN, log.config.evaluation.panel_size), captions_of(log.panels[panel]).get("images_per_prompt", 0)
    )
    return layout.cut(open_grid(log, panel).convert("RGB"))


def _row(log: RunLog, panel: int, name: str) -> Row:
    record = log.panels[panel]
    lines = [name, f"reward {record['reward'][0]:.4g}"]
    if "vendi" in record:
        lines.append(f"Vendi Score {record['vendi'][0]:.4g}")
    return Row(lines, grid_images(log, panel)[:IMAGES])
