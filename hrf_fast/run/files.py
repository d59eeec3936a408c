"""Files that a crash leaves whole: written aside, flushed and renamed; logs read line by line."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hrf_fast.errors import writing


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of it.

    Raises:
        NotWritten: the disk is full or unwritable.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    finally:
        # a disk that takes no file takes no removal either, which is not what the user should read
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether a file is what `write_atomically` leaves aside where the process is killed in it."""
    return re.fullmatch(r"\..+\.\d+\.tmp", path.name) is not None and path.is_file()


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, whole or not at all; after a half-written one it begins on a line of its own.

    Raises:
        NotWritten: the disk is full or unwritable.
    """
    # one write of a whole line to an append-only file: a crash can't tear it
    data = (line + "\n").encode()
    with writing(path), open(path, "ab+", buffering=0) as file:
        if file.tell():
            # a full disk has left a part of the last line
            file.seek(-1, os.SEEK_END)
            data = data if file.read(1) == b"\n" else b"\n" + data
        if file.write(data) < len(data):
            # a disk that has room for a part of it takes that part without an error
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder with `fill(path)` so that a crash leaves the old one, the new one or none; never half a one.

    Raises:
        NotWritten: the disk is full or unwritable; the old one is as it was.
    """
    with writing(folder):
        _replace_folder(folder, fill)


def _replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    aside, old = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        fill(aside)
        for path in [*aside.rglob("*"), aside]:
            _fsync(path)
        if folder.exists() or folder.is_symlink():
            # a folder can't be renamed onto a full one
            remove_folder(old)
            folder.rename(old)
        aside.rename(folder)
        # after a crash between the two it is all that there was
        remove_folder(old)
        _fsync(folder.parent)
    except SafetensorError as error:
        # what a full disk is called by safetensors
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder if it is there, or the link to one that somebody has put in its place."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        # Windows can't open a folder, and writes names with the files
        return
    # and flushes only a file that is open for writing
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
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


def read_object(path: Path, way_out: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        way_out: the end of the error, after a semicolon.

    Raises:
        ValueError: something else is in the file, by its path.
    """
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise TypeError(f"it is a JSON {type(value).__name__}, not an object")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {way_out}") from error
    return value


def read_log(path: Path, needs: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Records of metrics.jsonl or evaluations.jsonl; a last line without its end, left by a full disk, is not one.

    Args:
        needs: names that every record must have besides `iteration`, each with a kind of KINDS; one that may be left
            out has a question mark.

    Raises:
        ValueError: a line that is not a record, by file and number.
    """
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            record = json.loads(line.decode())
            check_record(record, needs)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a record of a run ({error}); mend or delete it") from error
        records.append(record)
    return records


def check_record(record: Any, needs: Mapping[str, str] | None = None) -> None:
    """Raise TypeError where a value is no record with `iteration` and what it `needs`, as `read_log` takes them."""
    if not isinstance(record, dict):
        raise TypeError("it is no mapping")
    for name, kind in {"iteration": "count", **(needs or {})}.items():
        if name not in record and not kind.endswith("?"):
            raise TypeError(f"it lacks {name!r}")
        if name in record and not KINDS[kind.removesuffix("?")](record[name]):
            raise TypeError(f"its {name!r} is {str(record[name])[:40]!r}, no {kind.removesuffix('?')}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(number) and math.isfinite(number) for number in value)


KINDS: dict[str, Callable[[Any], bool]] = {
    "count": lambda value: type(value) is int,
    "number": _is_number,
    "number or null": lambda value: value is None or _is_number(value),
    "list of numbers": _are_numbers,
    "list of texts": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "interval": lambda value: _are_numbers(value) and len(value) == 3,
    "mapping of numbers": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "text": lambda value: isinstance(value, str),
    "intervals": lambda value: isinstance(value, dict) and all(map(KINDS["interval"], value.values())),
}
"""Values that a log may hold."""
PANEL = {
    "evaluations": "count",
    "reward": "interval",
    "rewards": "list of numbers",
    "vendi": "interval?",
    "vendi_per_prompt": "interval?",
    "inception": "interval?",
    "looks": "interval?",
    "kept": "intervals?",
    "prompts": "list of texts?",
    "terms": "mapping of numbers?",
    "held_out": "intervals?",
}
"""Names of evaluations.jsonl that are read again."""
INTERVALS = tuple(name for name, kind in PANEL.items() if kind in ("interval", "interval?"))
HELD_OUT = "held_out/"
"""Before the name of a held-out reward, among names of metrics."""
EVENT = {"event": "text", "text": "text", "figures": "mapping of numbers"}
"""Names of events.jsonl."""


def intervals_of(panel: Mapping[str, Any]) -> dict[str, list[float]]:
    """The intervals of a line of evaluations.jsonl by metric, after those of a panel's images its held-out rewards."""
    plain = {name: panel[name] for name in INTERVALS if name in panel}
    return plain | {f"{HELD_OUT}{name}": interval for name, interval in panel.get("held_out", {}).items()}
