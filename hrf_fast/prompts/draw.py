"""How prompts are drawn: from a list by weight, or by a function of the user's.

A draw is a function of (seed, iteration): a run of any number of ranks, or one that was resumed, draws equal prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hrf_fast.noise import noise_generator, seeded_globals
from hrf_fast.prompts.base import Prompt, as_prompt
from hrf_fast.user_code import user_code


class Prompts(Protocol):
    """A source of prompts."""

    def draw(self, seed: int, iteration: int, count: int) -> list[Prompt]:
        """`count` prompts, a function of (seed, iteration); ask on one rank only where code of the user's answers."""
        ...

    def fixed(self, seed: int, count: int) -> list[Prompt]:
        """The `count` prompts of a panel, or fewer where the source has no more; equal at every call."""
        ...


@dataclass(frozen=True)
class PromptList:
    """Prompts that are drawn by weight, with replacement, or each text at most once in an iteration."""

    name: str
    prompts: Sequence[Prompt]
    weights: Sequence[float]
    """One for each prompt: finite, at least 0, not all 0."""
    distinct: bool = False
    """Whether a draw has no text twice; `draw_distinct` makes such a list."""

    def draw(self, seed: int, iteration: int, count: int) -> list[Prompt]:
        generator = noise_generator(seed, iteration, "prompts")
        chances = self._chances()
        if not self.distinct:
            index = torch.multinomial(chances, count, replacement=True, generator=generator)
            return [self.prompts[number] for number in index.tolist()]
        # all of them in turn: to skip a text that came before is to draw from the others by their weights
        order = torch.multinomial(chances, int(chances.count_nonzero()), replacement=False, generator=generator)
        first: dict[str, Prompt] = {}
        for number in order.tolist():
            first.setdefault(self.prompts[number].text, self.prompts[number])
        return list(first.values())[:count]

    def fixed(self, seed: int, count: int) -> list[Prompt]:
        """The first prompts of the list that can be drawn at all; each once."""
        drawable = [prompt for prompt, weight in zip(self.prompts, self.weights, strict=True) if weight > 0]
        return drawable[:count]

    @property
    def texts(self) -> set[str]:
        """The texts that can be drawn."""
        return {self.prompts[number].text for number in self._chances().nonzero().flatten().tolist()}

    def _chances(self) -> Tensor:
        """[N] fp64, relative to each other."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        # of the largest weight, so that the sum of huge ones is finite
        return weights / weights.max()


@dataclass(frozen=True)
class PromptFunction:
    """A function that returns one (text, metadata) at each call, as TRL's prompt_fn; called once for every group."""

    name: str
    option: str
    """The option that names it, for errors."""
    function: Callable[[], Any]
    """Draws from the generators of `random`, numpy and torch, which are seeded before and put back afterwards."""
    negative: str

    def draw(self, seed: int, iteration: int, count: int) -> list[Prompt]:
        with seeded_globals(seed, iteration, "prompts"), user_code(f"{self.option} {self.name}"):
            drawn = [self.function() for _ in range(count)]
        return [as_prompt(item, f"{self.option} {self.name!r}", self.negative)[0] for item in drawn]

    def fixed(self, seed: int, count: int) -> list[Prompt]:
        return self.draw(seed, 0, count)


def draw_distinct(prompts: Prompts | None, source: str | None, groups: int) -> PromptList:
    """A source whose draws for `groups` groups have no text twice, by successive draws without replacement.

    Args:
        source: prompts.source, for errors.

    Raises:
        ValueError: no list, or one of too few texts.
    """
    rule = f"prompts.distinct is true but prompts.source {source!r}"
    if not isinstance(prompts, PromptList):
        raise ValueError(
            f"{rule} is a function that is asked for each group's prompt and may answer twice alike; let it return a "
            "list of prompts, or leave prompts.distinct out"
        )
    if (count := len(prompts.texts)) < groups:
        raise ValueError(
            f"{rule} has {count} different prompts for train.groups_per_iteration {groups}; name a longer list, use "
            f"at most {count} groups, or leave prompts.distinct out"
        )
    return replace(prompts, distinct=True)
