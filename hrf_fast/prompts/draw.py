"""How prompts are drawn: from a list by weight, or by a function of the user's.

A draw is a function of (seed, iteration): a run of any number of ranks, or one that was resumed, draws equal prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

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
    """Prompts that are drawn by weight, with replacement."""

    name: str
    prompts: Sequence[Prompt]
    weights: Sequence[float]
    """One for each prompt: finite, at least 0, not all 0."""

    def draw(self, seed: int, iteration: int, count: int) -> list[Prompt]:
        generator = noise_generator(seed, iteration, "prompts")
        weights = torch.tensor(self.weights, dtype=torch.float64)
        # of the largest weight, so that the sum of huge ones is finite
        index = torch.multinomial(weights / weights.max(), count, replacement=True, generator=generator)
        return [self.prompts[number] for number in index.tolist()]

    def fixed(self, seed: int, count: int) -> list[Prompt]:
        """The first prompts of the list that can be drawn at all; each once."""
        drawable = [prompt for prompt, weight in zip(self.prompts, self.weights, strict=True) if weight > 0]
        return drawable[:count]


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
