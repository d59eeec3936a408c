"""Named: rewards and schedules that are handed over from Python, put into a configuration under their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hrf_fast.config.options import Config, RewardConfig
from hrf_fast.config.paths import with_absolute_paths
from hrf_fast.registry import qualified_name

Named = str | Callable[..., Any] | None


def with_names(config: Config, reward: Named, schedule: Named) -> Config:
    """The configuration that a run's folder will hold; another name starts without the kwargs of the one before.

    Raises:
        TypeError: a reward or schedule is neither a name nor callable.
    """
    for what, thing in (("reward", reward), ("schedule", schedule)):
        if thing is not None and not (isinstance(thing, str) or callable(thing)):
            raise TypeError(f"{what} is of {type(thing)}; pass a name or a function")
    if reward is not None:
        name, kwargs = _named(reward, config.reward.name, config.reward.kwargs)
        config = replace(config, reward=RewardConfig(name=name, kwargs=kwargs))
    if schedule is not None:
        name, kwargs = _named(schedule, config.window.schedule, config.window.kwargs)
        config = replace(config, window=replace(config.window, schedule=name, kwargs=kwargs))
    return with_absolute_paths(config)


def _named(thing: str | Callable[..., Any], before: str | None, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and kwargs of a reward or schedule that takes the place of `before`."""
    if callable(thing):
        return qualified_name(thing), kwargs
    return thing, kwargs if thing == before else {}
