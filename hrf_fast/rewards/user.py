"""A reward of your own, named in the config as `module:function`.

The function is called as `function(images, prompts, **kwargs)` and returns B numbers as a tensor, array or list. It is
resolved, and its signature compared with the kwargs, before the run starts. It gets what the built-in rewards get and
the same checks; it is not sandboxed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hrf_fast.registry import load_user_function
from hrf_fast.rewards.registry import Reward

if TYPE_CHECKING:
    from torch import Tensor


def build_user(spec: str, kwargs: dict[str, Any]) -> Reward:
    """Bind the config's kwargs to the function that `spec` names.

    Raises:
        ValueError: `spec` is malformed or does not lead to a function, or the function does not take
            (images, prompts, **kwargs).
    """
    module, colon, attribute = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise ValueError(f'reward.name is {spec!r}; write "module:function" or "package.module:function"')
    function = load_user_function(spec, "reward.name")
    if inspect.isclass(function):
        raise ValueError(f"reward.name is {spec!r}, which is a class; name a function, or an instance with __call__")
    try:
        signature = inspect.signature(function)
    except ValueError:
        # some functions written in C have none to read; they fail at the first call instead
        signature = None
    if signature is not None:
        try:
            signature.bind(None, None, **kwargs)
        except TypeError as error:
            call = ", ".join(["images", "prompts", *(f"{key}=…" for key in kwargs)])
            raise ValueError(
                f"reward.name is {spec!r}, which is called as {attribute}({call}) but defined as "
                f"{attribute}{signature}: {error}; change the kwargs or the function"
            ) from error

    def reward(images: Tensor, prompts: Sequence[str] | None = None) -> Any:
        return function(images, prompts, **kwargs)

    return reward
