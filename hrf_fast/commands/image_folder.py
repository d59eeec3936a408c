"""A folder of images: a PNG for each, and prompts.jsonl with what each was asked to show."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from hrf_fast.errors import writing
from hrf_fast.evaluation.panel import Panel
from hrf_fast.policies.base import Policy
from hrf_fast.prompts import Prompt
from hrf_fast.run.files import append_line, write_atomically
from hrf_fast.vision.base import to_bytes

PROMPTS = "prompts.jsonl"


def check_folder(folder: Path) -> None:
    """Raise ValueError for a path that is neither new nor an empty folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--folder is {folder}, which is a file; name a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--folder is {folder}, which is there and not empty; name a new folder, or empty that one")


def write_folder(folder: Path, panel: Panel, policy: Policy) -> None:
    """Draw a panel's images into a folder, call by call: 000000.png and so on, with a line of prompts.jsonl for each.

    A process that is stopped leaves PNGs that are complete, and no line without its PNG.

    Raises:
        NotWritten: the disk is full or unwritable.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=panel.size, desc="sample", unit="image") as bar:
        for part in panel.noise(policy).split(panel.images_per_call):
            numbers = part.sample_id.tolist()
            prompts = [panel.prompt(number) for number in numbers]
            images = policy.decode(panel.denoise(policy, part))
            for number, prompt, pixels in zip(numbers, prompts, to_bytes(images), strict=True):
                file = f"{number:06d}.png"
                data = io.BytesIO()
                Image.fromarray(pixels.numpy()).save(data, format="PNG")
                write_atomically(folder / file, data.getvalue())
                append_line(folder / PROMPTS, json.dumps({"file": file, **_described(prompt)}))
                bar.update()


def _described(prompt: Prompt | None) -> dict[str, Any]:
    if prompt is None:
        return {}
    metadata = {"metadata": prompt.metadata} if prompt.metadata else {}
    return {"prompt": prompt.text, "negative": prompt.negative, **metadata}
