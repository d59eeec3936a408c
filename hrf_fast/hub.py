"""Hub: where a model lies that an option names as shipped, as a local folder or by hub id; one rule for all options.

Only the files asked for are downloaded. huggingface_hub is imported when something has to be fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hrf_fast.registry import nearest

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def find_folder(
    option: str,
    value: Any,
    *,
    shipped: Mapping[str, Path] | None = None,
    revision: str | None = None,
    files: Sequence[str] = ("*.json",),
    weights: Sequence[str] = ("*.safetensors", "*.bin"),
) -> Path:
    """The local folder of a model, downloaded if need be.

    Args:
        option, value: the option that names the model, for errors, and what it was set to.
        shipped: folders of the names that ship with the package.
        revision: of a hub repository: a branch, tag or commit.
        files: patterns of the repository's files to download.
        weights: patterns to download besides, of which the first that matches something is enough; () for none.

    Raises:
        ValueError: no such folder, and neither a shipped name nor a hub id that can be downloaded.
    """
    local = find_local_folder(option, value, shipped=shipped)
    if local is not None:
        return local

    def download() -> Path:
        from huggingface_hub import snapshot_download

        for pattern in weights:
            snapshot = Path(snapshot_download(value, revision=revision, allow_patterns=[*files, pattern]))
            if list(snapshot.rglob(pattern)):
                return snapshot
        if weights:
            raise FileNotFoundError(f"no file is named like {' or '.join(weights)}")
        return Path(snapshot_download(value, revision=revision, allow_patterns=list(files)))

    return _fetch(option, value, "folder", f"hf download {value} --local-dir some/folder", "some/folder", download)


def find_local_folder(option: str, value: Any, *, shipped: Mapping[str, Path] | None = None) -> Path | None:
    """The folder that `find_folder` returns without a download, or None for a hub id.

    Raises:
        ValueError: no such folder, and neither a shipped name nor of the form of a hub id.
    """
    shipped = shipped or {}
    forms = f"{', '.join(shipped)}, a folder or a hub id" if shipped else "a folder or a hub id"
    _check_text(option, value, forms)
    folder = shipped.get(value, Path(value).expanduser())
    # the path of an empty text would be the current folder
    if value and folder.is_dir():
        return folder
    if HUB_ID.fullmatch(value):
        return None
    also = f", and not one of the shipped {', '.join(shipped)}" if shipped else ""
    raise ValueError(
        f"{option} is {value!r}{nearest(value, shipped)}: no such folder, not a hub id (owner/name){also}; use {forms}"
    )


def find_file(option: str, value: Any) -> Path:
    """A local file, or one of a hub repository, named "owner/repository:filename".

    Raises:
        ValueError: no such file, here or on the hub.
    """
    forms = 'a file or "owner/repository:filename" on the hub'
    _check_text(option, value, forms)
    path = Path(value).expanduser()
    if path.is_file():
        return path
    repository, _, filename = value.partition(":")
    if not HUB_ID.fullmatch(repository) or not filename:
        raise ValueError(f"{option} is {value!r}: no such file, and not of the hub's form; use {forms}")

    def download() -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, filename))

    command = f"hf download {repository} {filename} --local-dir some/folder"
    return _fetch(option, value, "file", command, f"some/folder/{filename}", download)


def first_line(error: Exception) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _check_text(option: str, value: Any, forms: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{option} is {value!r}; use {forms}, as text")


def _fetch(option: str, value: str, kind: str, command: str, result: str, download: Callable[[], Path]) -> Path:
    try:
        return download()
    # besides its own errors the client lets through those of its HTTP and transfer libraries
    except Exception as error:
        raise ValueError(
            f"{option} is {value!r}: no such {kind}, and the hub did not deliver it ({first_line(error)}); on a "
            f"connected machine run `{command}` and set {option}={result}"
        ) from error
