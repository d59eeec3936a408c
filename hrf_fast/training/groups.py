"""Groups: which groups an iteration has, which rank holds them, and one group before its rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hrf_fast.noise import NoiseKey
from hrf_fast.policies.base import Condition
from hrf_fast.prompts import Prompt
from hrf_fast.windows.base import Window


@dataclass(frozen=True)
class Groups:
    """An iteration's groups, split into optimizer steps, and each step's split over the ranks.

    Group and sample numbers are those of one process, so any number of ranks computes the same, up to rounding.
    """

    per_iteration: int
    size: int
    """Samples of a group."""
    per_step: int
    """Groups that one optimizer step averages over; a divisor of per_iteration and a multiple of ranks."""
    rank: int = 0
    ranks: int = 1

    @property
    def num_steps(self) -> int:
        """Optimizer steps of one pass over an iteration."""
        return self.per_iteration // self.per_step

    def of_step(self, step: int) -> range:
        """The groups of an optimizer step, over all ranks."""
        return range(step * self.per_step, (step + 1) * self.per_step)

    def of_rank(self, step: int, rank: int) -> range:
        """The groups of an optimizer step that `rank` rolls out and learns from."""
        share = self.per_step // self.ranks
        first = step * self.per_step + rank * share
        return range(first, first + share)

    def own(self, steps: Sequence[int] | None = None) -> list[int]:
        """The groups of this rank, in the order of the optimizer steps `steps` (all of the iteration's by default)."""
        numbers = range(self.num_steps) if steps is None else steps
        return [group for step in numbers for group in self.of_rank(step, self.rank)]

    def sample_ids(self, group: int) -> range:
        """The numbers of a group's samples within the iteration."""
        return range(group * self.size, (group + 1) * self.size)

    def rounds(self, order: str) -> list[Sequence[int]]:
        """Which optimizer steps are rolled out together: all of them (collect), or one at a time (on_policy)."""
        return [range(self.num_steps)] if order == "collect" else [[step] for step in range(self.num_steps)]


@dataclass(frozen=True)
class Group:
    """One group before its rollout: B samples that share an anchor, a window and a prompt."""

    number: int
    """Within the iteration, over all ranks."""
    window: Window
    """Steps to keep and to train; the steps after the window run and are not kept."""
    noise: NoiseKey
    """One counter per sample."""
    condition: Condition
    """One row per sample, of one storage where they have one prompt."""
    anchor: Tensor | None = None
    """[*latent_shape], clean; None where the group starts from pure noise."""
    prompt: Prompt | None = None
    """The prompt of all its samples; None for a model that takes none."""
    origin: Tensor | None = None
    """[B, *latent_shape] at the window's first step, where deterministic steps have led there; otherwise None."""

    @property
    def size(self) -> int:
        return len(self.noise)
