"""Files that a crash leaves whole: written aside, flushed and renamed; logs read line by line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


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


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl or evaluations.jsonl; a last line without its end, left by a full disk, is not one.

    Raises:
        ValueError: a line that is not a record, by file and number.
    """
    records = []
    for number, line in enumerate(path.read_text().split("\n")[:-1] if path.exists() else [], start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["iteration"], int):
                raise TypeError("iteration is not a whole number")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number} is not a record of a run ({error}); mend or delete it") from error
        records.append(record)
    return records
