"""Sources: the user's files and the pretrained weights that a run began with, in its sources.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hrf_fast.registry import load_user_function
from hrf_fast.run.checkpoint import list_checkpoints
from hrf_fast.run.files import read_object
from hrf_fast.run.layout import RunFiles
from hrf_fast.user_code import source_of

SOURCES = "sources.json"
# in it: the pretrained weights, which no checkpoint holds
BASE = "base model"
# where a caller has handed over a policy, which no configuration can build again
POLICY = "policy"


def read_sources(run: Path) -> dict[str, dict[str, str]]:
    """Read a run's sources.json; empty for a run that began without.

    Raises:
        ValueError: the file is damaged.
    """
    path, way_out = run / SOURCES, "restore it, or delete it to go on without a comparison to what the run began with"
    sources = read_object(path, way_out) if path.exists() else {}
    if not all(isinstance(source, dict) and {"file", "sha256"} <= source.keys() for source in sources.values()):
        raise ValueError(f"{path} is damaged (a source in it lacks its file or SHA-256); {way_out}")
    return sources


def check_base(run: Path, name: str, base: str) -> None:
    """Refuse other pretrained weights than those that a run began with; one that has not kept their digest passes.

    Args:
        name: model.name; base: the digest of its weights, see `Network.base_digest`.

    Raises:
        ValueError: they are others.
    """
    before = read_sources(run).get(BASE)
    if base and before and before["sha256"] != base:
        raise ValueError(
            f"model.name is {name!r}, whose weights are not those of {before['file']!r} when the run in {run} began; "
            f"restore them, or begin another run. Where all weights were trained, a checkpoint has them, and {BASE!r} "
            f"can be taken out of {run / SOURCES}"
        )


def policy_source(policy: Any) -> dict[str, str]:
    """The entry of a policy of the user's: its class, and the SHA-256 of its source where there is one."""
    kind = type(policy)
    source = source_of(policy) or {}
    return {"file": f"{kind.__module__}:{kind.__qualname__}", "sha256": source.get("sha256", "")}


def made_source(made: Any, named: Any, option: str) -> dict[str, str] | None:
    """The source of what a factory has made; of the factory, where the class of that is not the user's.

    Args:
        named: the factory, or the name that `option` has for it.
    """
    factory = load_user_function(named, option) if isinstance(named, str) and ":" in named else named
    return source_of(made) or (source_of(factory) if callable(factory) else None)


def check_policy_kind(run: Path, sources: Mapping[str, Any] | None = None) -> None:
    """Refuse a run that was trained from a policy of the user's where there is none now.

    Args:
        sources: of what goes on with the run; None for a command, which has no such policy.

    Raises:
        ValueError: says whose policy the run's is.
    """
    files = RunFiles(run)
    trained = list_checkpoints(files.checkpoints) or files.model.is_dir()
    before = read_sources(run).get(POLICY) if trained else None
    if before and POLICY not in (sources or {}):
        raise ValueError(
            f"{run} is a run of a policy of your own, {before['file']}, which its configuration can't build: "
            "model.name only labels it. Hand the policy to build_components(config, policy=…) and go on from Python "
            "(docs/models.md#a-policy-of-your-own)"
        )


def edited(run: Path, sources: Mapping[str, Mapping[str, str] | None]) -> dict[str, str]:
    """The user's files, by what names them, that are not what they were when a run began.

    Args:
        sources: as they are now, as `source_of` gives them.
    """
    before = read_sources(run)
    return {
        name: source["file"]
        for name, source in sources.items()
        if source and name in before and before[name]["sha256"] != source["sha256"]
    }


def edited_notes(run: Path, sources: Mapping[str, Mapping[str, str] | None]) -> list[str]:
    """A line for each of the user's files of `edited`."""
    return [
        f"{name} has changed since the run began ({file}): what came before and what comes now can't be compared"
        for name, file in edited(run, sources).items()
    ]
