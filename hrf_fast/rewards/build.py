"""From the terms of a config, or a function, to one callable that checks every call.

What is checked: the images that go in (so that a [-1, 1] tensor is refused rather than rewarded) and the numbers that
come out (B of them, real, finite). Nothing is normalised here: rewards keep their units, advantages standardise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrf_fast.config.options import RewardTerm
from hrf_fast.prompts import Prompt
from hrf_fast.registry import check_module
from hrf_fast.rewards.registry import (
    NAME_OPTION,
    OPTION_PREFIX,
    NotFiniteError,
    Reward,
    RewardError,
    Rewards,
    build_registered,
    reads_prompts,
    takes_metadata,
)
from hrf_fast.rewards.user import build_function, build_user
from hrf_fast.user_code import note_of, source_of, user_code

# images come from a clamp, so only rounding can leave [0, 1]
RANGE_TOLERANCE = 1e-3


def check_names(names: Sequence[str], option: str = NAME_OPTION) -> list[str]:
    """Refuse rewards that do not exist, without loading or importing anything of theirs.

    Args:
        names: registered names, or `module:function`; option: which has them, for errors.

    Returns:
        The names of rewards that can't do without prompts; a function of the user's is not known to.

    Raises:
        ValueError: an unknown name, a malformed `module:function`, or a module that is nowhere.
    """
    for name in names:
        if ":" in name:
            check_module(name, option)
    return [name for name in names if ":" not in name and reads_prompts(name, option)]


def build_reward(
    reward: str | Callable[..., Any] | Sequence[RewardTerm],
    device: torch.device | str = "cpu",
    kwargs: dict[str, Any] | None = None,
    *,
    option_prefix: str = OPTION_PREFIX,
    name_option: str = NAME_OPTION,
) -> CombinedReward:
    """Build a reward that checks its calls.

    Args:
        reward: the terms of a config, summed by weight; the name of one, registered or `module:function`; or a
            function, called as `module:function` is (see `user.py`) and named after itself.
        device: where the networks of learned rewards live.
        kwargs: arguments of a name or a function; terms have their own.
        option_prefix: what the options that set the kwargs of a name begin with, for errors; of a term it is
            "reward.terms[0].kwargs." and so on.
        name_option: the option that names the reward, for errors.

    Raises:
        ValueError: no terms, a weight that is not finite, only zero weights, an unknown name or argument, a function
            that does not take (images, prompts), or weights that are neither on disk nor downloadable.
        ImportError: a package that the reward needs is not installed.
        UserCodeError: a factory of the user's failed.
    """
    if callable(reward):
        name = getattr(reward, "__name__", type(reward).__name__)
        return CombinedReward([_BuiltTerm(name, name, 1.0, build_function(reward, name, kwargs or {}))])
    terms = [RewardTerm(reward, kwargs=kwargs or {})] if isinstance(reward, str) else reward
    prefixes = [option_prefix] if isinstance(reward, str) else [f"reward.terms[{i}].kwargs." for i in range(len(terms))]
    if not terms:
        raise ValueError('reward.terms is empty; give at least one, for example name: "jpeg_compressibility"')
    for term in terms:
        if not math.isfinite(term.weight):
            raise ValueError(f"the weight of reward {term.name!r} is {term.weight}; use a finite number")
    if all(term.weight == 0 for term in terms):
        raise ValueError("every weight in reward.terms is 0, so there is nothing to learn; make one of them non-zero")
    built: list[_BuiltTerm] = []
    for term, prefix in zip(terms, prefixes, strict=True):
        kwargs = {str(key): value for key, value in term.kwargs.items()}
        if ":" in term.name:
            function = build_user(term.name, kwargs, name_option)
        else:
            function = build_registered(term.name, kwargs, device, prefix)
        reads = ":" not in term.name and reads_prompts(term.name)
        count = sum(other.name == term.name for other in built)
        key = f"{term.name}_{count + 1}" if count else term.name
        built.append(_BuiltTerm(term.name, key, term.weight, function, reads))
    return CombinedReward(built)


@dataclass(frozen=True)
class _BuiltTerm:
    name: str
    key: str
    weight: float
    reward: Reward
    reads_prompts: bool = False

    def __call__(self, images: Tensor, prompts: Sequence[Prompt | None]) -> Any:
        """Call the reward with the images and the prompts' texts, and their metadata where it takes that."""
        texts = [prompt.text for prompt in prompts if prompt is not None]
        arguments: list[Any] = [images, texts if len(texts) == len(prompts) else None]
        # our wrapper of a user's function has the parameter, or has not
        if takes_metadata(self.reward, {}, follow_wrapped=False):
            arguments.append(tuple(copy.deepcopy(dict(prompt.metadata)) if prompt else {} for prompt in prompts))
        return self.reward(*arguments)


class CombinedReward:
    """Weighted sum of rewards; every call is checked, nothing is differentiated, and what calls change is put back."""

    def __init__(self, terms: Sequence[_BuiltTerm]) -> None:
        self._terms = tuple(terms)
        self.name = " + ".join(term.key for term in terms)
        # of the terms that are trained on
        self.weights = {term.key: term.weight for term in terms if term.weight}
        # lines about global state that calls have changed, each once
        self.notes: dict[str, None] = {}
        self.sources = {f"reward {term.key}": source_of(term.reward) for term in terms}

    def __call__(self, images: Tensor, prompts: Sequence[Prompt | str | None] | None = None) -> Rewards:
        """Reward a batch.

        Args:
            images: [B, 3, H, W] float in [0, 1].
            prompts: B of them, or texts; None, or None for each, where the images have no prompts.

        Raises:
            ValueError: images or prompts are not as above, or a term that reads prompts got none for an image.
            RewardError: a term raised, or returned something else than B finite numbers.
        """
        check_images(images, prompts)
        asked = [Prompt(item) if isinstance(item, str) else item for item in prompts or [None] * len(images)]
        if without := asked.count(None):
            for term in self._terms:
                if term.reads_prompts:
                    raise ValueError(
                        f"reward {term.key!r} compares images with their prompts and got none for {without} of "
                        f"{len(images)} images; give a prompt for each, or use a reward of images alone (`hrf rewards`)"
                    )
        total = torch.zeros(len(images), dtype=torch.float32, device=images.device)
        by_term = {}
        # a reward must not depend on the precision that the run trains in
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            for term in self._terms:
                what = f"reward {term.key!r}"
                with user_code(what, RewardError) as changes:
                    # a reward may write into its images; the next term and the caller need theirs
                    values = term(images.clone(), asked)
                if changes:
                    self.notes[note_of(what, changes)] = None
                values = check_rewards(images, values, term.key)
                # a reward may return the same memory at every call
                by_term[term.key] = values.clone()
                # fp64 where a term is
                total = total + term.weight * values
        if not total.isfinite().all():
            raise NotFiniteError(f"reward {self.name!r}: the sum is not finite in {total.dtype}; use smaller weights")
        return Rewards(total, by_term)


def check_images(images: Tensor, prompts: Sequence[Prompt | str | None] | None = None) -> None:
    """Refuse images that no reward is meant for.

    Raises:
        ValueError: not [B, 3, H, W] float with B at least 1, outside [0, 1] or NaN, or not one prompt per image.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0 or not images.is_floating_point():
        raise ValueError(
            f"rewards take float images [B, 3, H, W], got {images.dtype} {list(images.shape)}; "
            "repeat the channel of grey images three times and scale bytes by 1/255"
        )
    low, high = (value.item() for value in images.aminmax())
    # written so that NaN fails too
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(
            f"rewards take images in [0, 1], got values in [{low:.3g}, {high:.3g}]; "
            "map [-1, 1] by images / 2 + 0.5 and clamp"
        )
    if prompts is not None and len(prompts) != len(images):
        raise ValueError(f"rewards got {len(prompts)} prompts for {len(images)} images; give one per image, or None")


def check_rewards(images: Tensor, rewards: Any, name: str) -> Tensor:
    """Turn what a reward returned into [B] fp32 on the images' device, or say what is wrong with it; fp64 stays fp64.

    Args:
        images: [B, 3, H, W], the images that were rewarded.
        rewards: a tensor, array or list of B numbers.
        name: the reward, for the message.

    Raises:
        RewardError: not numbers, not one per image, NaN or infinite.
    """
    expected = f"expected {len(images)} real numbers, one per image"
    try:
        if isinstance(rewards, np.ndarray):
            # torch takes no negative strides, which scores[::-1] has, and no other byte order than the machine's
            rewards = rewards.astype(rewards.dtype.newbyteorder("="), order="C")
        values = torch.as_tensor(rewards)
        if values.layout is not torch.strided or values.is_nested or values.is_meta:
            raise TypeError("it is sparse, nested or without values")
    except Exception as error:
        raise RewardError(
            f"reward {name!r} returned a {type(rewards).__name__} that is not an array of numbers; {expected} "
            "(no tuple, no info dict)"
        ) from error
    if values.is_complex():
        raise RewardError(f"reward {name!r} returned {values.dtype}; {expected}")
    if values.shape != (len(images),):
        raise RewardError(f"reward {name!r} returned shape {list(values.shape)}; {expected}: [{len(images)}]")
    # fp32 has no digits for small differences beside a large offset
    double = values.dtype == torch.float64
    values = values.detach().to(images.device, torch.float64 if double else torch.float32)
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(f"{index} ({values[index].item()})" for index in bad[:5])
        raise NotFiniteError(
            f"reward {name!r} returned {len(bad)} of {len(images)} values that are NaN or infinite, "
            f"first at index {shown}; {expected}, finite in {'fp64' if double else 'fp32'}"
        )
    return values
