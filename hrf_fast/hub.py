"""Hub: where a model lies that an option names as shipped, as a local folder or by hub id; one rule for all options.

Only the files asked for are downloaded, and none that an earlier download of any program has left in the hub's cache.
huggingface_hub is imported when something has to be fetched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hrf_fast.registry import nearest

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
Choose = Callable[[Path, Collection[str]], Collection[str]]
"""(folder of the files that came first, names of all files of the repository) -> names of files to download besides."""


def find_folder(
    option: str,
    value: Any,
    *,
    shipped: Mapping[str, Path] | None = None,
    revision: str | None = None,
    files: Sequence[str],
    choose: Choose | None = None,
) -> Path:
    """The local folder of a model, downloaded if need be.

    Args:
        option, value: the option that names the model, for errors, and what it was set to.
        shipped: folders of the names that ship with the package.
        revision: of a hub repository: a branch, tag or commit.
        files: names or patterns of the repository's files to download first; which of them are needed is the caller's
            to check, for in a cache that another program has filled some may be missing.
        choose: answers which files to download then, and may refuse the model instead; asked again once they are there,
            until it names no others. Not called for a local folder.

    Raises:
        ValueError: no such folder, and neither a shipped name nor a hub id that can be downloaded; or a revision of
            a local one.
    """
    local = find_local_folder(option, value, shipped=shipped)
    if local is not None:
        if revision is not None:
            raise ValueError(
                f"{option.partition('.')[0]}.revision is {revision!r} but {option} is {value!r}, which is not of the "
                f"hub: it is {local}; leave the revision out"
            )
        return local
    snapshot, names, unreachable = _snapshot(option, value, revision, files)
    asked: list[str] = []
    while True:
        try:
            chosen = choose(snapshot, names) if choose else ()
        except ValueError as error:
            if unreachable is None:
                raise
            searched = f"only {snapshot} was searched: the hub could not be asked, {first_line(unreachable)}"
            raise ValueError(f"{error} ({searched})") from error
        missing = [name for name in chosen if not (snapshot / name).is_file()]
        # what the hub has not brought is left to the caller to miss
        if not missing or missing == asked:
            return snapshot
        if unreachable is not None:
            raise _not_delivered(option, value, "folder", unreachable) from unreachable
        # the folder's name is the commit, which cannot change in between as a branch can
        _download(option, value, snapshot.name, missing)
        asked = missing


def files_in(folder: Path) -> list[str]:
    """The names of all files in a folder and below it, relative and with slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _snapshot(
    option: str, value: str, revision: str | None, files: Sequence[str]
) -> tuple[Path, Collection[str], Exception | None]:
    """A repository's folder in the hub's cache with the named files, as far as there are any.

    Returns:
        The folder; the names of all files of the repository, or of those in the folder where the hub can't be asked;
        and the error in that case.
    """
    from huggingface_hub import HfApi

    try:
        repository = HfApi().model_info(value, revision=revision)
    # besides its own errors the client lets through those of its HTTP library
    except Exception as error:
        snapshot = _cached(value, revision, files)
        if snapshot is None:
            raise _not_delivered(option, value, "folder", error) from error
        return snapshot, files_in(snapshot), error
    names = [file.rfilename for file in repository.siblings or ()]
    return _download(option, value, revision, files), names, None


def _cached(value: str, revision: str | None, names: Sequence[str]) -> Path | None:
    """The folder in the hub's cache that holds one of the named files, whatever else it lacks."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        path = try_to_load_from_cache(value, name, revision=revision)
        # a file that is known not to exist answers with a marker
        if isinstance(path, str):
            return Path(path).parents[name.count("/")]
    return None


def _download(option: str, value: str, revision: str | None, names: Collection[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(value, revision=revision, allow_patterns=list(names)))
    # besides its own errors the client lets through those of its HTTP and transfer libraries
    except Exception as error:
        raise _not_delivered(option, value, "folder", error) from error


def find_local_folder(option: str, value: Any, *, shipped: Mapping[str, Path] | None = None) -> Path | None:
    """The folder that `find_folder` returns without a download, or None for a hub id.

    Raises:
        ValueError: no such folder, and neither a shipped name nor of the form of a hub id.
    """
    shipped = shipped or {}
    forms = f"{', '.join(shipped)}, a folder or a hub id" if shipped else "a folder or a hub id"
    _check_text(option, value, forms)
    folder = shipped.get(value, Path(os.path.expanduser(value)))
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
    path = Path(os.path.expanduser(value))
    if path.is_file():
        return path
    repository, _, filename = value.partition(":")
    if not HUB_ID.fullmatch(repository) or not filename:
        raise ValueError(f"{option} is {value!r}: no such file, and not of the hub's form; use {forms}")

    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, filename))
    # as for a folder
    except Exception as error:
        raise _not_delivered(option, repository, "file", error, filename) from error


def first_line(error: Exception) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _check_text(option: str, value: Any, forms: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{option} is {value!r}; use {forms}, as text")


def _not_delivered(option: str, repository: str, kind: str, error: Exception, filename: str = "") -> ValueError:
    """An error about a folder, or about the file of this name, that can't be had from the hub."""
    value, name, path = (
        (f"{repository}:{filename}", f" {filename}", f"/{filename}") if filename else (repository, "", "")
    )
    way_out = _licence(repository, error) or (
        f"on a connected machine run `hf download {repository}{name} --local-dir some/folder` and set "
        f"{option}=some/folder{path}"
    )
    return ValueError(
        f"{option} is {value!r}: no such {kind}, and the hub did not deliver it ({first_line(error)}); {way_out}"
    )


def _licence(repository: str, error: Exception) -> str:
    """The way to a repository that the hub denies; empty for an error of another kind."""
    gated = type(error).__name__ == "GatedRepoError"
    if not gated and getattr(getattr(error, "response", None), "status_code", None) not in (401, 403):
        return ""
    # of a name that does not exist the hub says no more than of a private one
    start = "" if gated else "check the name; if the repository is private or gated, "
    return (
        f"{start}accept the licence on https://huggingface.co/{repository}, then run `hf auth login` (or set HF_TOKEN) "
        "with an account that has access"
    )
