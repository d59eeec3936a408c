"""Component: a part of a pipeline as files: its config, and the files that hold its weights. Nothing is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# the names of a part's weights, one file or shards that an index lists: diffusers', and transformers' by suffix
_DIFFUSERS = {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"}
_TRANSFORMERS = {"safetensors": "model", "bin": "pytorch_model"}
_STEMS = "diffusion_pytorch_model|model|pytorch_model"
VARIANT = re.compile(rf"(?:{_STEMS})\.(?:(?:safetensors|bin)\.index\.)?([^.-]+)\.(?:safetensors|bin|json)")
INDEXES = "diffusion_pytorch_model.*index*.json"


@dataclass(frozen=True)
class Component:
    """A part of a pipeline: the folder that holds it, its config, and the files of its weights."""

    folder: Path
    config: dict[str, Any]
    kind: str = ""
    """Its class in diffusers or transformers."""
    weights: tuple[str, ...] = ()
    """Names in the folder: one file, or an index and then its shards; empty where there are none."""
    variant: str | None = None
    """The variant that these files are of."""

    @property
    def of_transformers(self) -> bool:
        return self.kind.startswith(("CLIP", "T5"))

    @property
    def has_weights(self) -> bool:
        """Whether it is a network."""
        return "Tokenizer" not in self.kind and not self.kind.endswith("Scheduler")


def weight_files(part: Component, folder: Path, names: Collection[str], variant: str | None) -> list[str]:
    """The files that the part's library reads: safetensors before .bin, an index with its shards before a single file.

    Returns:
        Their names in the part's folder; nothing where it has none of the variant.
    """
    start = "" if part.folder == folder else f"{part.folder.name}/"
    dot = f".{variant}" if variant else ""
    for suffix, stem in stems(part).items():
        # the second form is how diffusers once named the index of a variant
        for index in (f"{stem}.{suffix}.index{dot}.json", f"{stem}.{suffix}{dot}.index.json"):
            if start + index in names:
                return [index, *sorted(set(shards_of(part.folder / index).values()))]
        if start + (single := f"{stem}{dot}.{suffix}") in names:
            return [single]
    return []


def stems(part: Component) -> dict[str, str]:
    """The names of a part's weights before their suffix, by suffix, the better first."""
    return _TRANSFORMERS if part.of_transformers else _DIFFUSERS


def shards_of(index: Path) -> dict[str, str]:
    """The file of each tensor, by name, as an index of sharded weights has them.

    Raises:
        ValueError: not an index, or one that names files outside its own folder.
    """
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) and Path(v).name == v for v in shards.values()):
        raise ValueError(
            f"model.name: {index} has no weight_map from tensors to files beside it; save the model again with "
            "diffusers' save_pretrained"
        )
    return shards


def read_json(path: Path, option: str = "model.name") -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{option}: {path} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{option}: {path} holds a JSON {type(values).__name__}, not an object; "
            "give the file that diffusers' save_pretrained writes"
        )
    return values
