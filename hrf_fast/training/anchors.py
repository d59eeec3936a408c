"""Anchors: the clean images that groups are re-noised from, and for how many iterations they serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hrf_fast.distributed import comm
from hrf_fast.windows.base import WindowSchedule

_NAME = "anchors"


class Anchors:
    """Remembers the anchors of all groups while they serve several iterations."""

    def __init__(self, steps: int = 0, reuse: int = 1) -> None:
        """`steps`: deterministic ones to draw them by, 0 for the sampler's own; `reuse`: iterations that they serve."""
        self.steps, self.reuse = steps, reuse
        # [groups of all ranks, *latent_shape] on the CPU; None before the first, and where nothing is used again
        self._remembered: Tensor | None = None

    def drawn_at(self, iteration: int) -> int:
        """The iteration whose anchors and prompts serve in `iteration`."""
        return iteration - iteration % self.reuse

    def take(
        self, iteration: int, numbers: Sequence[int], device: torch.device, draw: Callable[[], Tensor]
    ) -> dict[int, Tensor]:
        """The anchors of this rank's groups by number, drawn if it is time; collective where they serve again.

        Args:
            draw: returns [len(numbers), *latent_shape].
        """
        if self.reuse == 1:
            return dict(zip(numbers, draw(), strict=True))
        if self.drawn_at(iteration) == iteration:
            parts = comm.gather((list(numbers), draw().cpu()))
            everybody = torch.tensor([number for here, _ in parts for number in here])
            self._remembered = torch.cat([drawn for _, drawn in parts])[everybody.argsort()]
        assert self._remembered is not None, "a checkpoint of a run that uses anchors again holds them"
        return {number: self._remembered[number].to(device) for number in numbers}

    def state(self) -> dict[str, Any]:
        """Tensors for a checkpoint; empty where nothing is used again."""
        return {} if self._remembered is None else {"tensors": {_NAME: self._remembered}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self._remembered = state.get("tensors", {}).get(_NAME)


def check_anchors(schedule: WindowSchedule, steps: int, reuse: int) -> None:
    """Refuse options of anchors for a schedule that draws none.

    Raises:
        ValueError: names the option and its value.
    """
    for option, value, neutral in (("anchor_steps", steps, 0), ("anchor_reuse", reuse, 1)):
        if value != neutral and not schedule.needs_anchors:
            raise ValueError(
                f"window.{option} is {value}, but groups of this window.schedule start from pure noise and have no "
                f"anchors; leave it at {neutral}, or choose a schedule with anchors, such as clusters"
            )
