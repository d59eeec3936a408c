"""The registry of rewards by name, and the small types every family shares.

Building and checking a reward is `build.py`; a `module:function` named in a config is `user.py`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from hrf_fast.errors import UserCodeError
from hrf_fast.registry import Registry, call_factory
from hrf_fast.signatures import Argument, arguments_of, summary

FAMILIES = ("jpeg", "aesthetic", "classifier", "text_image", "remote")
OPTION_PREFIX = "reward.kwargs."
"""Beginning of the options that set the arguments of the reward `reward.name`."""
NAME_OPTION = "reward.name"
"""The option that names the reward which is trained on."""
_OF_THE_RUN = ("device", "option_prefix")


class Reward(Protocol):
    """Images [B, 3, H, W] in [0, 1] and B prompts -> [B], higher is better; None for a model that takes no prompts.

    One whose third argument is named metadata gets the metadata of each prompt there.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor: ...


class Rewards(NamedTuple):
    """The rewards of a batch, and what its terms contribute."""

    total: Tensor
    """[B] on the images' device: the weighted sum of the terms; fp32, or fp64 where a term returns that."""
    terms: dict[str, Tensor]
    """[B] of each term before its weight, by name; a name used twice gets `_2` the second time."""


class RewardError(UserCodeError):
    """A reward failed, or returned something that is not B finite numbers. The message names the reward."""


class NotFiniteError(RewardError):
    """A reward returned B numbers, of which some are NaN or infinite."""


@dataclass(frozen=True)
class RewardInfo:
    """One reward as `hrf rewards` prints it."""

    name: str
    description: str
    arguments: tuple[Argument, ...]
    needs: str
    reads_prompts: bool
    """Whether it can't reward an unconditional model."""


Factory = TypeVar("Factory", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Entry:
    factory: Callable[..., Any]
    needs: str
    reads_prompts: bool


_rewards: Registry[_Entry] = Registry("reward", NAME_OPTION)


def register_reward(
    name: str, *, needs: str = "nothing beyond torch", reads_prompts: bool = False
) -> Callable[[Factory], Factory]:
    """Register a factory under a name.

    The factory's arguments are the `kwargs` of a `RewardTerm`, and it returns a `Reward`. Arguments called `device` and
    `option_prefix` come from the run and not from the config. The second is what the names of the others begin with
    where a user sets them, such as "reward.kwargs.", for errors. The first line of the docstring and the lines of its
    `Args:` section are what `list_rewards` shows.

    Args:
        name: unique, without a colon (a colon marks `module:function`).
        needs: packages, files or downloads that the reward cannot do without.
        reads_prompts: refuse the reward for a model that takes no prompts.

    Raises:
        ValueError: the name has a colon, or another factory has it already.
    """
    if not name or ":" in name:
        raise ValueError(f"register_reward: name is {name!r}; use a non-empty name without a colon")

    def decorate(factory: Factory) -> Factory:
        _rewards.register(name)(_Entry(factory, needs, reads_prompts))
        return factory

    return decorate


def list_rewards() -> list[RewardInfo]:
    """Every registered reward, by name. Loads no weights and imports no model library."""
    _load_families()
    return [
        RewardInfo(
            name, summary(entry.factory), arguments_of(entry.factory, _OF_THE_RUN), entry.needs, entry.reads_prompts
        )
        for name, entry in ((name, _rewards[name]) for name in sorted(_rewards))
    ]


def build_registered(name: str, kwargs: dict[str, Any], device: Any, option_prefix: str = OPTION_PREFIX) -> Reward:
    """Call the factory of `name` with the config's arguments.

    Args:
        option_prefix: what the options that set the arguments begin with, for errors.

    Raises:
        ValueError: unknown name, unknown or missing argument, or one of the run's; the message says which ones there
            are.
    """
    _load_families()
    factory = _rewards[name].factory
    values = dict(zip(_OF_THE_RUN, (device, option_prefix), strict=True))
    of_the_run = {key: value for key, value in values.items() if key in inspect.signature(factory).parameters}
    return call_factory(factory, option_prefix.rstrip(". "), kwargs, **of_the_run)


def reads_prompts(name: str, option: str = NAME_OPTION) -> bool:
    """Whether a registered reward can't do without prompts.

    Args:
        option: which has the name, for errors.

    Raises:
        ValueError: no reward of this name is registered.
    """
    _load_families()
    return _rewards.look_up(name, option).reads_prompts


def takes_metadata(function: Callable[..., Any], kwargs: Mapping[str, Any], *, follow_wrapped: bool = True) -> bool:
    """Whether the third positional parameter is TRL's (`metadata`, or `prompt_metadata`)."""
    try:
        signature = inspect.signature(function, follow_wrapped=follow_wrapped)
    except ValueError:
        # some functions written in C have none to read
        return False
    positional = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return len(positional) > 2 and positional[2].endswith("metadata") and positional[2] not in kwargs


def _load_families() -> None:
    for family in FAMILIES:
        importlib.import_module(f"hrf_fast.rewards.{family}")
