"""Grids: images as one picture, each prompt above its images where there are prompts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hrf_fast.errors import writing
from hrf_fast.vision.base import to_bytes

# images of a panel that grids and listeners are shown
SHOWN = 64
# height of a caption and of its letters, in shares of the grid's width
_CAPTION, _LETTERS = 1 / 36, 1 / 48


@dataclass(frozen=True)
class Grid:
    """The layout of a grid of `count` images, row by row."""

    count: int
    images_per_prompt: int = 0
    """Neighbours that share a caption; 0 for a grid without captions."""

    @property
    def columns(self) -> int:
        """About as many as rows; a row holds whole blocks of images that share a caption, or a block whole rows."""
        columns, share = max(1, round(self.count**0.5)), self.images_per_prompt
        if not share:
            return columns
        if share <= columns:
            return round(columns / share) * share
        return next(number for number in range(columns, share + 1) if share % number == 0)

    @property
    def rows(self) -> int:
        return -(-self.count // self.columns)

    def caption_height(self, width: int) -> int:
        """Pixels over each row of a grid of this width."""
        return max(12, round(width * _CAPTION)) if self.images_per_prompt else 0

    def cut(self, picture: Image.Image) -> list[Image.Image]:
        """The images of a picture of this layout, as large as they are there."""
        width = picture.width // self.columns
        band, row = self.caption_height(picture.width), picture.height // self.rows
        corners = [(i % self.columns * width, i // self.columns * row + band) for i in range(self.count)]
        return [picture.crop((left, top, left + width, top + row - band)) for left, top in corners]


def image_grid(
    images: Tensor,
    *,
    columns: int | None = None,
    scale: int = 0,
    captions: Sequence[str] = (),
    images_per_prompt: int = 0,
) -> Image.Image:
    """Images [N, 3, H, W] in [0, 1] as one picture, small ones enlarged to be seen (`scale` 0 chooses).

    Args:
        captions: one for every `images_per_prompt` images, written above them and shortened to their width.
    """
    count, _, height, width = images.shape
    grid = Grid(count, images_per_prompt if captions else 0)
    columns = columns or grid.columns
    rows = -(-count // columns)
    scale = scale or max(1, 64 // width)
    # white cells fill the last row
    canvas = torch.full((rows * columns, height, width, 3), 255, dtype=torch.uint8)
    canvas[:count] = to_bytes(images)
    canvas = canvas.reshape(rows, columns, height, width, 3).transpose(1, 2).reshape(rows * height, columns * width, 3)
    picture = Image.fromarray(canvas.numpy())
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    return _captioned(picture, grid, captions) if captions else picture


def captions_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The last two arguments of `image_grid` for a panel's line of evaluations.jsonl."""
    prompts = record.get("prompts", [])
    return {"captions": prompts, "images_per_prompt": len(record["rewards"]) // len(prompts)} if prompts else {}


def _captioned(picture: Image.Image, grid: Grid, captions: Sequence[str]) -> Image.Image:
    """The rows of a grid with a band above each, which holds the captions of its blocks."""
    band, row = grid.caption_height(picture.width), picture.height // grid.rows
    higher = Image.new("RGB", (picture.width, picture.height + grid.rows * band), "white")
    for number in range(grid.rows):
        part = picture.crop((0, number * row, picture.width, (number + 1) * row))
        higher.paste(part, (0, number * (row + band) + band))
    draw = ImageDraw.Draw(higher)
    font = ImageFont.load_default(max(9, round(picture.width * _LETTERS)))
    cell = picture.width // grid.columns
    width = cell * min(grid.images_per_prompt, grid.columns)
    # images that are not shown have captions too
    for image, caption in zip(range(0, grid.count, grid.images_per_prompt), captions, strict=False):
        left, top = image % grid.columns * cell, image // grid.columns * (row + band)
        text = _shortened(" ".join(caption.split()), lambda text: draw.textlength(text, font), width - band / 2)
        draw.text((left + band / 6, top + band / 2), text, fill="#1a1a1a", font=font, anchor="lm")
    return higher


def _shortened(text: str, measure: Callable[[str], float], width: float) -> str:
    """The longest beginning of a text that is no wider, with an ellipsis where it was cut."""
    if measure(text) <= width:
        return text
    fitting = bisect_right(range(len(text)), width, key=lambda end: measure(text[:end] + "…"))
    return text[: fitting - 1].rstrip() + "…" if fitting else ""


def check_picture(path: Path) -> None:
    """Raise ValueError for a path whose suffix is that of no picture that can be written."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{path} is no name of a picture (unknown file extension: {path.suffix}); end it with .png")


def save_grid(images: Tensor, path: Path, *, captions: Sequence[str] = (), images_per_prompt: int = 0) -> None:
    """Write `image_grid` as PNG, making its folder.

    Raises:
        NotWritten: the disk is full or unwritable.
        ValueError: `path` has the suffix of no picture.
    """
    check_picture(path)
    picture = image_grid(images, captions=captions, images_per_prompt=images_per_prompt)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def read_grid(path: Path) -> Image.Image:
    """A grid that `save_grid` wrote, of any size: Pillow refuses large pictures, since a stranger's may be a trap.

    Raises:
        OSError: no such file, or a damaged one.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    finally:
        Image.MAX_IMAGE_PIXELS = limit
