"""Weights as a file holds them, judged before they are used: their names, their shapes and their numbers.

Every loader says by these functions why the weights of a file can't be used: "missing tensors (conv_out.bias)".
`read_tensors` reads the files, and `digest` tells whether weights are those of another day.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

Shape = Sequence[int]
# names that an error lists
_LISTED = 3


def read_tensors(path: Path, way_out: str) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, by name, on the CPU.

    Args:
        way_out: the end of the error, after a semicolon.

    Raises:
        ValueError: the file is damaged or can't be read, by its path.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read ({error}); {way_out}") from error


def judge(needed: Mapping[str, Shape], tensors: Mapping[str, Tensor]) -> str:
    """The problem with `tensors` for a module of these shapes by name; empty where they fit and are finite."""
    return compare(needed, {name: tensor.shape for name, tensor in tensors.items()}) or not_finite(tensors)


def compare(needed: Mapping[str, Shape], present: Mapping[str, Shape]) -> str:
    """The difference between two mappings of shapes by name, as `in_words` puts it."""
    wrong = [(name, present[name], shape) for name, shape in needed.items() if name in present]
    return in_words(
        needed.keys() - present.keys(),
        present.keys() - needed.keys(),
        [entry for entry in wrong if tuple(entry[1]) != tuple(entry[2])],
    )


def in_words(missing: Collection[str], unexpected: Collection[str], wrong: Iterable[tuple[str, Shape, Shape]]) -> str:
    """Missing and unexpected tensors, and wrong shapes as (name, shape in the file, shape needed), in words.

    Returns:
        Empty where there are none.
    """
    shapes = [f"{name} is {list(present)} instead of {list(needed)}" for name, present, needed in sorted(wrong)]
    parts = {
        "missing tensors": missing,
        "unexpected tensors": unexpected,
        "tensors of another shape": shapes,
    }
    return " and ".join(f"{text} ({_listed(names)})" for text, names in parts.items() if names)


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The names of tensors that hold NaN or infinity, in words; empty where all numbers are finite."""
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    return f"NaN or infinity in tensors ({_listed(bad)})" if bad else ""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 of names, shapes, dtypes and the sum of every row's bits as integers, exact and equal on every device.

    A sum reads each number once, at the speed of the memory that holds it: a hash of the bytes themselves would copy
    gigabytes from a GPU. It tells models apart and is no protection against forgery.
    """
    code = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        rows = tensor.detach().contiguous()
        bits = (rows.flatten(1) if rows.dim() > 1 else rows.reshape(1, -1)).view(torch.uint8)
        # as 64-bit numbers, whose sum wraps, where a row has a whole number of them: others would be copied to 64 bits
        if bits.shape[1] % 8 == 0:
            # a view may begin in the middle of such a number
            bits = (bits if bits.data_ptr() % 8 == 0 else bits.clone()).view(torch.int64)
        sums = bits.sum(1, dtype=torch.int64)
        code.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode() + sums.cpu().numpy().tobytes())
    return code.hexdigest()


def _listed(names: Collection[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(sorted(names)[:_LISTED]) + (f" and {more} more" if more > 0 else "")
