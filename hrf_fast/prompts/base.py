"""Prompt: what one group is asked to show."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hrf_fast.registry import nearest

_KEYS = ("prompt", "weight", "negative", "metadata")
# likeness of a misspelt key by difflib: negative_prompt has 0.696, the keys of GenEval's files less than 0.5
_LIKE = 0.69
# other words that resemble one of them
_NO_SLIPS = ("height", "prompt_id")


@dataclass(frozen=True)
class Prompt:
    """One prompt; the samples of a group share it."""

    text: str
    negative: str = ""
    """Text that guidance leads away from."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """For rewards that read it; JSON-able."""


def as_prompt(item: Any, where: str, negative: str) -> tuple[Prompt, float]:
    """A prompt and its weight from text, a pair (text, metadata), or a mapping with `prompt`.

    Args:
        item: a mapping may have `weight` (1 by default), `negative` and `metadata`; without `metadata`, its other keys
            are the metadata.
        where: the item's place, for errors; negative: of an item that has none of its own.

    Raises:
        ValueError: anything else, an empty prompt, a weight that is negative or not finite, a key that resembles one of
            ours, or other keys beside `metadata`.
    """
    if isinstance(item, str):
        item = {"prompt": item}
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        item = {"prompt": item[0], "metadata": item[1]}
    if not isinstance(item, Mapping) or "prompt" not in item:
        raise ValueError(f'{where} is {item!r}; use text, or {{"prompt": "a cat", "weight": 1, "metadata": {{…}}}}')
    others = {key: value for key, value in item.items() if key not in _KEYS}
    for key in map(str, others):
        if key not in _NO_SLIPS and (hint := nearest(key.lower(), _KEYS, cutoff=_LIKE)):
            raise ValueError(f"{where} has {key}{hint}; correct it, or put what is meant for rewards into metadata")
    if others and "metadata" in item:
        raise ValueError(
            f"{where} has {', '.join(sorted(map(str, others)))} beside metadata; its keys are prompt, weight, negative "
            "and metadata, so put the others into metadata"
        )
    text, own_negative = item["prompt"], item.get("negative")
    metadata, weight = others or item.get("metadata") or {}, item.get("weight", 1)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} has the prompt {text!r}; use text that is not empty")
    if any("\ud800" <= letter <= "\udfff" for letter in f"{text}{own_negative}"):
        raise ValueError(f"{where} has the prompt {text!r}, with half of a character; write the file again as UTF-8")
    if own_negative is not None and not isinstance(own_negative, str):
        raise ValueError(f"{where} has the negative prompt {own_negative!r}; use one text")
    # written so that NaN fails, and an int that is no float
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= sys.float_info.max:
        raise ValueError(f"{where} has the weight {weight!r}; use a finite number of at least 0")
    if not isinstance(metadata, Mapping) or not _is_json(metadata):
        raise ValueError(f"{where} has the metadata {metadata!r}; use a mapping of what JSON can hold")
    return Prompt(text, negative if own_negative is None else own_negative, dict(metadata)), float(weight)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
