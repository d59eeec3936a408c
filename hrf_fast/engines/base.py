"""Engine: the protocol of whatever owns the weights, with the loss scale and the averaged weights that engines share.

plain.py keeps whole weights on every rank; zero.py shards them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hrf_fast.distributed import comm


class Engine(Protocol):
    """Owner of the weights, as the update and the checkpoint see it.

    Every rank's loss is the mean over its own groups, and the engine averages over ranks. All ranks call every method,
    in the same order.
    """

    lockstep: bool
    """Whether a forward or backward waits for the other ranks, so that all must make equally many."""
    ema: Ema
    """The averaged weights, of which a decay of 0 keeps none."""

    def accumulating(self) -> AbstractContextManager[None]:
        """Around the backwards of one optimizer step, each after its forward; kept forwards may come before."""
        ...

    def backward(self, loss: Tensor, *, kept: bool = False) -> None:
        """Add the gradients of a loss; `kept` says that its forward was made in the rollout."""
        ...

    def gradients(self) -> list[Tensor]:
        """Copies of what the backwards of this step have added up so far on this rank, without a loss scale.

        Raises:
            NotImplementedError: the engine shards them as they come.
        """
        ...

    def finish(self, padding: int) -> None:
        """End the backwards of a step; `padding` is how many forwards the busiest rank has made beyond this one's.

        A no-op for an engine that is not in lockstep.
        """
        ...

    def step(self) -> Tensor:
        """Clip, check and apply the gradients; returns their norm before clipping, a scalar.

        Raises:
            FloatingPointError: a gradient is not finite; the weights are as they were, on every rank.
        """
        ...

    def set_learning_rate(self, learning_rate: float) -> None: ...

    def gathered(self, *, ema: bool = False) -> AbstractContextManager[None]:
        """Whole weights in the model, for sampling and saving; with `ema` the averaged ones, if there are any."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every trained weight by name."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name, whole where they are gathered: inside `gathered()`."""
        ...

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors named "index.key" by index of the weight, only on the main rank, and JSON-able numbers."""
        ...

    def ema_state(self) -> dict[str, Tensor]:
        """The averaged weights by name, only on the main rank; empty when they are off."""
        ...

    def load(
        self,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        numbers: dict[str, Any],
        ema: Mapping[str, Tensor],
    ) -> None:
        """Restore what the three above have given; the tensors are asked of the main rank only."""
        ...


class LossScaleOverflow(FloatingPointError):
    """The gradients of fp16 overflowed: the step is dropped and the next one has a smaller scale. Part of fp16."""


class LossScale:
    """fp16's factor on the loss, that keeps small gradients from vanishing: halved on overflow, then doubled again."""

    start, growth_interval = 2.0**16, 200

    def __init__(self, precision: str) -> None:
        self.dynamic = precision == "fp16"
        self.value = self.start if self.dynamic else 1.0
        self.good_steps = 0

    def check(self, norm: Tensor) -> None:
        """Refuse a gradient norm that is not finite, and adapt.

        Raises:
            LossScaleOverflow: another, smaller scale may do; FloatingPointError: none will.
        """
        if not math.isfinite(float(norm)):
            self.good_steps = 0
            if self.value > 1:
                self.value /= 2
                message = f"fp16 gradients overflowed; the loss scale is now {self.value:g}"
                raise comm.on_all_ranks(LossScaleOverflow(message))
            raise comm.on_all_ranks(
                FloatingPointError(
                    f"the gradient norm is {float(norm)}: this optimizer step was not made; use a lower "
                    "optimizer.learning_rate or compute.precision=fp32 in a new run.folder, from the same model or "
                    "from one that `hrf export` makes of the last checkpoint (docs/run_folder.md)"
                )
            )
        self.good_steps += 1
        if self.dynamic and self.good_steps % self.growth_interval == 0:
            self.value *= 2

    def state(self) -> dict[str, float]:
        return {"loss_scale": self.value, "good_steps": self.good_steps}

    def load(self, state: dict[str, Any]) -> None:
        self.good_steps = int(state.get("good_steps", 0))
        if self.dynamic:
            self.value = state.get("loss_scale", self.start)


class Ema:
    """Exponential moving average of the part of each weight that this rank holds; decay 0 is off.

    The decay of the n-th optimizer step that moves weights is min(decay, (1 + n)/(10 + n)), so that a run of any length
    averages its own weights: after the first step the pretrained model's share is 2/11, after ten it is 6e-5.
    """

    def __init__(self, parts: Sequence[Tensor], decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.parts = [part.detach().clone() for part in parts] if decay else []

    @torch.no_grad()
    def update(self, parts: Sequence[Tensor], learning_rate: float) -> None:
        """Take in the weights after an optimizer step, which a burn-in's rate of 0 has not moved."""
        if learning_rate == 0:
            return
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for average, part in zip(self.parts, parts if self.decay else [], strict=True):
            average.lerp_(part, 1 - decay)


@contextmanager
def averaged(parameters: list[nn.Parameter], averages: list[Tensor]) -> Iterator[None]:
    """The averages in place of the weights; nothing when there are none."""
    originals = [parameter.detach().clone() for parameter in parameters] if averages else []
    try:
        _copy(parameters, averages)
        yield
    finally:
        try:
            _copy(parameters, originals)
        except KeyboardInterrupt:
            # a checkpoint follows, which half of the averages must not get into
            _copy(parameters, originals)
            raise


@torch.no_grad()
def _copy(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters if values else [], values, strict=True):
        parameter.copy_(value)


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
