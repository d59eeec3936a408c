"""Thinning: the calls of an update that are left out, such that the gradient or its expectation stays what it is."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from hrf_fast.noise import noise_generator
from hrf_fast.training.calls import Call


@dataclass(frozen=True)
class Thinning:
    """Rules of which calls an update makes; by default all of them."""

    share: float = 1.0
    """Share of a window's steps; each is chosen with this probability and weighted by its inverse."""
    skip_flat: bool = False
    """Leave out calls whose groups all have advantages of 0."""

    @property
    def active(self) -> bool:
        return self.share < 1 or self.skip_flat

    def thin(
        self, calls: Sequence[Call], *, offset: float, steps_per_call: int, flat: Collection[int]
    ) -> tuple[list[Call], float]:
        """The calls to make, each whole, and the factor of their losses.

        Systematic sampling (Madow 1944): of calls numbered by their steps, number i is chosen where
        ⌊share·(i + 1) + offset⌋ > ⌊share·i + offset⌋. For an offset uniform in [0, 1) that has probability `share` for
        each, and the chosen ones are evenly spread. Calls are numbered by their step, so that groups that share a call
        have it chosen together.

        Args:
            offset: in [0, 1), equal on all ranks; flat: groups whose advantages are all 0.

        Returns:
            At least one call, with factor 0 where none is chosen: weights without a gradient would not be stepped.
        """
        chosen = [
            call
            for call in calls
            if _is_chosen(call.steps.start // steps_per_call, self.share, offset)
            and not (self.skip_flat and all(piece.group in flat for piece in call.pieces))
        ]
        return (chosen, 1 / self.share) if chosen else (list(calls[:1]), 0.0)


def _is_chosen(index: int, share: float, offset: float) -> bool:
    return math.floor(share * (index + 1) + offset) > math.floor(share * index + offset)


def draw_offsets(seed: int, iteration: int, epochs: int, steps: int) -> list[list[float]]:
    """The offsets of every inner epoch and optimizer step of an iteration, equal on all ranks."""
    generator = noise_generator(seed, iteration, "steps")
    return torch.rand(epochs, steps, generator=generator, dtype=torch.float64).tolist()  # type: ignore[no-any-return]
