"""Checkpoints: written aside, hashed, renamed into place; resumed exactly, never unpickled.

A checkpoint folder holds the trained tensors (`weights.safetensors`), `optimizer.safetensors`, with averaged weights on
`ema.safetensors`, tensors that the loop remembers in `remembered.safetensors`, `state.json`, and `manifest.json` with
the SHA-256 of every file. Random numbers need no state (noise.py): weights, optimizer and counters are all. Every
engine on any number of ranks writes and reads the same files; only the main rank touches them. `hrf export` makes a
diffusers folder of a checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hrf_fast.distributed import comm
from hrf_fast.engines.base import Engine
from hrf_fast.engines.optimizers import contiguous_copy, judge_state
from hrf_fast.run.files import replace_folder, sha256
from hrf_fast.weights import judge, read_tensors

_PREFIX = "iteration-"
WEIGHTS, OPTIMIZER, AVERAGES = "weights.safetensors", "optimizer.safetensors", "ema.safetensors"
# tensors of the state
REMEMBERED = "remembered.safetensors"
_RESTORE = "delete its checkpoint to go on from the one before, or restore a copy"
Shapes = Mapping[str, tuple[int, ...]]


def save_checkpoint(folder: Path, engine: Engine, state: dict[str, Any], *, keep: int, best: int | None = None) -> Path:
    """Save after `state["iteration"]` complete iterations; drop all but the newest `keep` checkpoints and the `best`.

    Args:
        state: counters to hand back on resume, JSON-able but for `tensors`, which are tensors by name.
        best: iteration of a checkpoint to keep whatever its age.

    Raises:
        OSError: the disk is full or unwritable; earlier checkpoints are intact.
    """
    iteration = state["iteration"]
    optimizer, numbers = engine.optimizer_state()
    ema = engine.ema_state()

    def fill(path: Path) -> None:
        save_file({name: contiguous_copy(value) for name, value in engine.weights().items()}, path / WEIGHTS)
        save_file(optimizer, path / OPTIMIZER)
        if ema:
            save_file({name: contiguous_copy(part) for name, part in ema.items()}, path / AVERAGES)
        record = {**state, "engine": numbers}
        if tensors := record.pop("tensors", None):
            save_file(tensors, path / REMEMBERED)
        (path / "state.json").write_text(json.dumps(record, indent=1))
        manifest = {str(file.relative_to(path)): sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}
        (path / "manifest.json").write_text(json.dumps(manifest, indent=1))

    def write() -> None:
        replace_folder(target, fill)
        # only what is older: a newer one was skipped as broken, and must not count as one of the kept
        older = [path for path in list_checkpoints(folder) if _iteration(path) < iteration]
        for old in older[keep - 1 :]:
            if _iteration(old) != best:
                shutil.rmtree(old)

    target = checkpoint_path(folder, iteration)
    with engine.gathered():
        comm.main_says(write)
    return target


def checkpoint_path(folder: Path, iteration: int) -> Path:
    """Where the checkpoint after so many iterations is."""
    return folder / f"{_PREFIX}{iteration:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; unfinished ones have another name and are not listed."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in entries if path.is_dir() and _iteration(path) >= 0), key=_iteration, reverse=True)


def has_trained(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from: not only one of the pretrained weights, before any iteration."""
    return any(_iteration(path) for path in list_checkpoints(folder))


def _iteration(path: Path) -> int:
    """The iteration in a checkpoint's name, -1 if it is no checkpoint."""
    match = re.fullmatch(rf"{_PREFIX}(\d+)", path.name)
    return int(match.group(1)) if match else -1


def sweep(folder: Path) -> None:
    """Remove what a killed save has left behind."""
    for leftover in (*folder.glob(f".{_PREFIX}*.tmp"), *folder.glob(f".{_PREFIX}*.old")):
        shutil.rmtree(leftover)


def load_newest(folder: Path, engine: Engine, *, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """Restore the newest checkpoint whose hashes are right; a broken one is named through `warn` and skipped.

    One of the pretrained weights, before the first iteration, is nothing to go on from.

    Returns:
        The saved state with `iteration`, or None where there is no checkpoint.

    Raises:
        ValueError: there are checkpoints, but every one is broken; or it is of another architecture, lacks a tensor or
            holds a number that is not finite.
    """
    return _load(lambda: [path for path in list_checkpoints(folder) if _iteration(path)], engine, warn, needed=True)


def load_first_intact(
    folder: Path, iterations: Sequence[int], engine: Engine, *, warn: Callable[[str], None]
) -> dict[str, Any] | None:
    """Restore the first of some checkpoints that is there and intact, as `load_newest`; others are skipped."""

    def listed() -> list[Path]:
        paths = {_iteration(path): path for path in list_checkpoints(folder)}
        return [paths[iteration] for iteration in iterations if iteration in paths]

    return _load(listed, engine, warn, needed=False)


def _load(
    listed: Callable[[], list[Path]], engine: Engine, warn: Callable[[str], None], *, needed: bool
) -> dict[str, Any] | None:
    """Restore the first of the listed checkpoints whose hashes are right; result and errors as `load_newest`.

    Args:
        needed: where all that are listed are broken, raise; else there is None.
    """
    shapes, averaging = engine.shapes(), engine.ema.decay > 0
    tensors: list[Mapping[str, Tensor]] = [{}, {}, {}]

    def read() -> dict[str, Any] | None:
        checkpoints = listed()
        for path in checkpoints:
            reason = _broken(path)
            if reason is None:
                tensors[:] = _read(path, shapes, averaging)
                state = json.loads((path / "state.json").read_text())
                remembered = path / REMEMBERED
                return {**state, "tensors": read_tensors(remembered, _RESTORE)} if remembered.is_file() else state
            warn(f"checkpoint {path} is skipped: {reason}")
        if checkpoints and needed:
            raise ValueError(
                f"no checkpoint in {checkpoints[0].parent} is intact; delete the folder to start again, or restore a "
                "copy"
            )
        return None

    state = comm.main_says(read)
    if state is not None:
        weights, optimizer, ema = tensors
        engine.load(weights, optimizer, state.pop("engine"), ema)
    return state


def _broken(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        lacking = {"state.json", OPTIMIZER, WEIGHTS} - set(manifest)
        if lacking:
            return f"its manifest lacks {', '.join(sorted(lacking))}"
        for name, digest in manifest.items():
            if sha256(path / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def read_weights(path: Path, shapes: Shapes) -> dict[str, Tensor]:
    """The weights that a checkpoint stands for: the averaged ones where the run averages, as in its panels and model/.

    Args:
        shapes: of the trained weights, by name.

    Raises:
        ValueError: the checkpoint is broken, of another architecture, or not finite.
    """
    if reason := _broken(path):
        raise ValueError(f"{path} is broken: {reason}; take another checkpoint, or restore a copy")
    return _read_tensors(path, AVERAGES if (path / AVERAGES).is_file() else WEIGHTS, shapes)


def _read(path: Path, shapes: Shapes, averaging: bool) -> list[Mapping[str, Tensor]]:
    """Weights, optimizer tensors and averaged weights of a checkpoint."""
    weights, optimizer = _read_tensors(path, WEIGHTS, shapes), read_tensors(path / OPTIMIZER, _RESTORE)
    if problem := judge_state(optimizer, list(shapes.values())):
        raise _unusable(path / OPTIMIZER, problem)
    if averaging and not (path / AVERAGES).is_file():
        raise ValueError(f"{path} has no {AVERAGES}, but optimizer.ema_decay is above 0; restore a copy of it")
    return [weights, optimizer, _read_tensors(path, AVERAGES, shapes) if averaging else {}]


def _read_tensors(path: Path, name: str, shapes: Shapes) -> dict[str, Tensor]:
    """A file of weights, trained or averaged."""
    tensors = read_tensors(path / name, _RESTORE)
    if problem := judge(shapes, tensors):
        raise _unusable(path / name, problem)
    return tensors


def _unusable(file: Path, problem: str) -> ValueError:
    return ValueError(
        f"{file} can't be used for the model of model.name: {problem}; restore that model, choose another run.folder, "
        f"or delete {file.parent} to go on from the checkpoint before"
    )
