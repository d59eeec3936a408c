"""Gradient noise: how far the gradient of an optimizer step is signal, from the step's own groups in two halves.

Groups are independent, so the sums A and B of the gradients of n/2 groups each, as shares of the step's gradient A + B,
give without bias (McCandlish et al., arXiv 1812.06162, appendix A.1, whose two batch sizes are here two halves):
the squared norm of the expected gradient, 4 ⟨A, B⟩, and the trace of the covariance of one group's gradient,
n |A − B|². Their ratio is the noise scale: a step of that many groups is half noise. Both are noisy themselves; add
them up over iterations before dividing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hrf_fast.distributed import comm
from hrf_fast.engines.base import Engine
from hrf_fast.training.calls import Call

# iterations to add up before a warning
_ENOUGH = 8


class GradientHalves:
    """The gradients of an optimizer step's groups of even numbers and of odd ones."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._even: list[Tensor] = []
        self._both: list[Tensor] = []

    def in_order(self, calls: Iterable[Call]) -> Iterator[Call]:
        """The calls of even groups, then those of odd ones."""
        calls = list(calls)
        yield from (call for call in calls if call.pieces[0].group % 2 == 0)
        self._even = self._engine.gradients()
        yield from (call for call in calls if call.pieces[0].group % 2)

    def end(self) -> None:
        """Note that all backwards are made; the engine's step scales what they have added up."""
        self._both = self._engine.gradients()

    def signal_and_noise(self, groups: int) -> tuple[Tensor, Tensor]:
        """Signal and noise, scalars, of a step of `groups` groups on each rank."""
        comm.average(self._even)
        comm.average(self._both)
        product, distance = torch.zeros(2, device=self._both[0].device).unbind()
        for even, both in zip(self._even, self._both, strict=True):
            odd = both - even
            product, distance = product + (even * odd).sum(), distance + (even - odd).square().sum()
        return 4 * product, groups * comm.world_size() * distance


class NoiseScale:
    """Adds up signal and noise over the iterations of this process, and says once that updates are mostly noise."""

    def __init__(self, groups_per_step: int, step_weights: str) -> None:
        self._groups, self._step_weights = groups_per_step, step_weights
        self._signal, self._noise, self._count = 0.0, 0.0, 0

    def add(self, signal: float | None, noise: float | None) -> str | None:
        """Add an iteration's means; returns a warning where the noise of a step exceeds its signal."""
        if signal is None or noise is None:
            return None
        self._signal, self._noise, self._count = self._signal + signal, self._noise + noise, self._count + 1
        if self._count < _ENOUGH or self._noise <= self._groups * self._signal:
            return None
        scale, enough = "too large to be measured", "a larger train.groups_per_step"
        if self._signal > 0:
            ratio = self._noise / self._signal
            scale, enough = f"{ratio:.3g} groups", f"train.groups_per_step of {math.ceil(ratio)} or more"
        weights = "" if self._step_weights != "equal" else ", train.step_weights=std"
        return (
            f"over {self._count} iterations the gradient's noise scale is {scale}, and an optimizer step averages "
            f"{self._groups}: its update is mostly noise; use {enough}, a larger train.group_size{weights}, "
            "or a lower optimizer.learning_rate"
        )
