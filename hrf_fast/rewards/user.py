"""A reward of your own: a function given to `build_reward`, or named in the config as `module:function`.

The function is called as `function(images, prompts, **kwargs)` and returns B numbers as a tensor, array or list. One
written for TRL, `function(images, prompts, metadata) -> (rewards, metadata)`, works too: its third argument is named
metadata and gets that of each image's prompt, an empty dict without one. The signature is compared with the kwargs
before the run starts. A function gets what the built-in rewards get and the same checks; it is not sandboxed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hrf_fast.registry import load_user_function
from hrf_fast.rewards.registry import NAME_OPTION, Reward, takes_metadata


def build_user(spec: str, kwargs: dict[str, Any], option: str = NAME_OPTION) -> Reward:
    """Bind the config's kwargs to the function that `spec` names.

    Args:
        option: which has the spec, for errors.

    Raises:
        ValueError: `spec` is malformed or does not lead to a function, or the function does not take
            (images, prompts, **kwargs).
    """
    function = load_user_function(spec, option)
    if inspect.isclass(function):
        raise ValueError(f"{option} is {spec!r}, which is a class; name a function, or an instance with __call__")
    return build_function(function, spec, kwargs, option)


def build_function(
    function: Callable[..., Any], name: str, kwargs: dict[str, Any], option: str = NAME_OPTION
) -> Reward:
    """Bind kwargs to a function; `name`, and the `option` that has it, are for errors.

    Raises:
        ValueError: the function takes neither (images, prompts, **kwargs) nor (images, prompts, metadata, **kwargs).
    """
    try:
        signature = inspect.signature(function)
    except ValueError:
        # some functions written in C have none to read; they fail at the first call instead
        signature = None
    like_trl = takes_metadata(function, kwargs)
    if signature is not None:
        try:
            signature.bind(None, None, *([None] if like_trl else []), **kwargs)
        except TypeError as error:
            attribute = name.rpartition(":")[2]
            arguments = ["images", "prompts", *(["metadata"] if like_trl else []), *(f"{key}=…" for key in kwargs)]
            raise ValueError(
                f"{option} is {name!r}, which is called as {attribute}({', '.join(arguments)}) but defined as "
                f"{attribute}{signature}: {error}; change the kwargs or the function"
            ) from error

    def plain(images: Tensor, prompts: Sequence[str] | None = None) -> Any:
        return function(images, prompts, **kwargs)

    def with_metadata(images: Tensor, prompts: Sequence[str] | None, metadata: Sequence[Mapping[str, Any]]) -> Any:
        result = function(images, prompts, metadata, **kwargs)
        return result[0] if isinstance(result, tuple) and len(result) == 2 else result

    reward: Any = with_metadata if like_trl else plain
    # whose source it is
    reward.__wrapped__ = function
    return reward
