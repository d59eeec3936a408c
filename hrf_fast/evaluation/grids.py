"""Grids: images as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hrf_fast.errors import writing

if TYPE_CHECKING:
    from PIL.Image import Image


# images of a panel that grids and listeners are shown
SHOWN = 64


def image_grid(images: Tensor, *, columns: int | None = None, scale: int = 0) -> Image:
    """Images [N, 3, H, W] in [0, 1] as one picture, small ones enlarged to be seen (`scale` 0 chooses)."""
    from PIL import Image

    count, _, height, width = images.shape
    columns = columns or grid_columns(count)
    rows = -(-count // columns)
    scale = scale or max(1, 64 // width)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    # white cells fill the last row
    canvas = torch.full((rows * columns, height, width, 3), 255, dtype=torch.uint8)
    canvas[:count] = pixels
    canvas = canvas.reshape(rows, columns, height, width, 3).transpose(1, 2).reshape(rows * height, columns * width, 3)
    picture = Image.fromarray(canvas.numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def grid_columns(count: int) -> int:
    """Columns of a grid of `count` images: about as many as rows."""
    return max(1, round(count**0.5))


def save_grid(images: Tensor, path: Path) -> None:
    """Write `image_grid` as PNG, making its folder.

    Raises:
        NotWritten: the disk is full or unwritable.
        ValueError: `path` has the suffix of no picture.
    """
    picture = image_grid(images)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture.save(path)
        except ValueError as error:
            raise ValueError(f"{path} is no name of a picture ({error}); end it with .png") from error
