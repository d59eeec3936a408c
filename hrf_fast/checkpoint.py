"""Checkpoints: written aside, hashed, renamed into place; resumed exactly, never unpickled.

A checkpoint folder holds `model/` (a diffusers pipeline), `optimizer.safetensors`, `state.json` and `manifest.json`
with the SHA-256 of every file. Random numbers need no state (seeds.py): weights, optimizer and counters are all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hrf_fast.policy import Policy

_PREFIX = "iteration-"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder with `fill(path)` so that a crash leaves the old one, the new one or none; never half a one."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        fill(aside)
        for path in [*aside.rglob("*"), aside]:
            _fsync(path)
        if folder.exists():
            # a folder can't be renamed onto a full one
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            aside.rename(folder)
            shutil.rmtree(old)
        else:
            aside.rename(folder)
        _fsync(folder.parent)
    except SafetensorError as error:
        # what a full disk is called by safetensors
        raise OSError(f"{folder} can't be written: {error}; free space, then the same command goes on") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(
    folder: Path, iteration: int, policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, keep: int
) -> Path:
    """Save after `iteration` complete iterations and drop all but the newest `keep` checkpoints.

    Args:
        state: JSON-able counters to hand back on resume.

    Raises:
        OSError: the disk is full or unwritable; earlier checkpoints are intact.
    """

    def fill(path: Path) -> None:
        policy.save(path / "model")
        tensors, scalars = _flatten_optimizer(optimizer)
        save_file(tensors, path / "optimizer.safetensors")
        record = {"iteration": iteration, "optimizer_scalars": scalars, **state}
        (path / "state.json").write_text(json.dumps(record, indent=1))
        manifest = {str(file.relative_to(path)): _sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}
        (path / "manifest.json").write_text(json.dumps(manifest, indent=1))

    target = folder / f"{_PREFIX}{iteration:06d}"
    replace_folder(target, fill)
    # only what is older: a newer one was skipped as broken, and must not count as one of the kept
    for old in [path for path in list_checkpoints(folder) if _iteration(path) < iteration][keep - 1 :]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; unfinished ones have another name and are not listed."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if path.is_dir() and _iteration(path) >= 0), key=_iteration, reverse=True)


def _iteration(path: Path) -> int:
    """The iteration in a checkpoint's name, -1 if it is no checkpoint."""
    match = re.fullmatch(rf"{_PREFIX}(\d+)", path.name)
    return int(match.group(1)) if match else -1


def sweep(folder: Path) -> None:
    """Remove what a killed save has left behind."""
    for leftover in (*folder.glob(f".{_PREFIX}*.tmp"), *folder.glob(f".{_PREFIX}*.old")):
        shutil.rmtree(leftover)


def load_newest(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, *, warn: Callable[[str], None]
) -> dict[str, Any] | None:
    """Restore the newest checkpoint whose hashes are right; a broken one is named through `warn` and skipped.

    Returns:
        The saved state with `iteration`, or None where there is no checkpoint.

    Raises:
        ValueError: there are checkpoints, but every one is broken.
    """
    checkpoints = list_checkpoints(folder)
    for path in checkpoints:
        reason = _broken(path)
        if reason is None:
            return _restore(path, policy, optimizer)
        warn(f"checkpoint {path} is skipped: {reason}")
    if checkpoints:
        raise ValueError(f"no checkpoint in {folder} is intact; delete the folder to start again, or restore a copy")
    return None


def _broken(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        lacking = {"state.json", "optimizer.safetensors", "model/unet/config.json"} - set(manifest)
        if lacking:
            return f"its manifest lacks {', '.join(sorted(lacking))}"
        for name, digest in manifest.items():
            if _sha256(path / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def _restore(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from diffusers import UNet2DModel

    saved = UNet2DModel.from_pretrained(path / "model" / "unet", low_cpu_mem_usage=False, use_safetensors=True)
    try:
        policy.unet.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint {path} is of another architecture than model.name's: {str(error).splitlines()[0]}; "
            "choose another run.folder, or restore the model"
        ) from error
    state = json.loads((path / "state.json").read_text())
    _restore_optimizer(optimizer, path / "optimizer.safetensors", state.pop("optimizer_scalars"))
    return state


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Optimizer state as flat tensors named "index.key", and its groups' numbers."""
    # not the 8-bit optimizers' own state_dict, which nests the state for FSDP
    state = torch.optim.Optimizer.state_dict(optimizer)
    tensors: dict[str, torch.Tensor] = {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            # 8-bit state shares its quantisation maps, which safetensors refuses, and counts its steps in an int
            shared = key.startswith("qmap")
            tensor = torch.as_tensor(value)
            tensors[f"{index}.{key}"] = tensor.clone() if shared else tensor.contiguous()
    return tensors, state["param_groups"]


def _restore_optimizer(optimizer: torch.optim.Optimizer, path: Path, groups: list[dict[str, Any]]) -> None:
    state: dict[int, dict[str, Any]] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            index, key = name.split(".", 1)
            value = file.get_tensor(name)
            state.setdefault(int(index), {})[key] = value.item() if value.dtype == torch.int64 else value
    # JSON has no tuples
    groups = [group | {"betas": tuple(group["betas"])} for group in groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
