"""Paths of a configuration, made absolute when a run is built: user code may change the current folder.

run.folder stays as it is written: config.yaml lies in that folder, which may be moved.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from hrf_fast.assets import PROMPT_LISTS, SHIPPED
from hrf_fast.config.options import Config


def absolute(path: str | Path) -> Path:
    """A path from the root, with ~ expanded; links are kept."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def with_absolute_paths(config: Config) -> Config:
    """The configuration with the local models and files that it names by their absolute paths.

    In `kwargs` of rewards, schedules and prompts, whose texts may be anything, a leading ~/ is expanded.
    """
    reward, file, model, prompts = config.reward, config.engine.deepspeed, config.model, config.prompts
    terms = [replace(term, kwargs=_expanded(term.kwargs)) for term in reward.terms]
    held_out = [replace(held, kwargs=_expanded(held.kwargs)) for held in config.evaluation.rewards]
    return replace(
        config,
        model=replace(model, name=_local(model.name), decoder=model.decoder and _local(model.decoder)),
        prompts=replace(prompts, source=_file(prompts.source), kwargs=_expanded(prompts.kwargs)),
        evaluation=replace(
            config.evaluation,
            network=_local(config.evaluation.network),
            prompts=_file(config.evaluation.prompts),
            rewards=held_out,
        ),
        engine=replace(config.engine, deepspeed=None if file is None else str(absolute(file))),
        reward=replace(reward, kwargs=_expanded(reward.kwargs), terms=terms),
        window=replace(config.window, kwargs=_expanded(config.window.kwargs)),
    )


def _local(name: str) -> str:
    """The absolute path of a local folder; a shipped name, a hub id and what is not there stay as they are."""
    return str(absolute(name)) if name and name not in SHIPPED and absolute(name).is_dir() else name


def _file(name: str | None) -> str | None:
    """The absolute path of a local file; the name of a list, a function and what is not there stay as they are."""
    return str(absolute(name)) if name and name not in PROMPT_LISTS and absolute(name).is_file() else name


def _expanded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expanded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value
