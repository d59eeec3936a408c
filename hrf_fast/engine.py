"""Engine: gradients, their clipping and the optimizer. One process; sharding is another engine behind the protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from hrf_fast.optimizers import build_optimizer
from hrf_fast.options import LEARNING_RATE_SCHEDULES


class Engine(Protocol):
    """What the update needs of whatever owns the weights."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def accumulating(self) -> AbstractContextManager[None]:
        """Around all forwards and backwards of one optimizer step."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> Tensor:
        """Clip, check and apply the gradients; returns their norm before clipping, a scalar on the device."""
        ...

    def set_learning_rate(self, learning_rate: float) -> None: ...


class PlainEngine:
    """AdamW on one device."""

    def __init__(
        self,
        model: nn.Module,
        *,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        max_grad_norm: float,
        optimizer: str = "adamw",
    ) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.max_grad_norm = max_grad_norm
        device = next(model.parameters()).device
        self.optimizer = build_optimizer(
            optimizer, self.parameters, betas=betas, eps=eps, weight_decay=weight_decay, device=device
        )

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self.optimizer.zero_grad(set_to_none=True)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> Tensor:
        """One AdamW step.

        Raises:
            FloatingPointError: a gradient is not finite; the weights are as they were.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf)
        if not math.isfinite(float(norm)):
            raise FloatingPointError(
                f"the gradient norm is {float(norm)}: this optimizer step was not made; lower train.learning_rate or "
                "use train.precision=fp32, and go on from the last checkpoint"
            )
        self.optimizer.step()
        return norm

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate


def learning_rate_at(schedule: str, *, peak: float, warmup_iterations: int, iterations: int) -> Callable[[int], float]:
    """Learning rate as a function of the iteration: linear warm-up, then constant or cosine down to zero.

    Args:
        schedule: constant or cosine; peak: the rate after warm-up; iterations: length of the run.
    """
    if schedule not in LEARNING_RATE_SCHEDULES:
        raise ValueError(
            f"train.learning_rate_schedule is {schedule!r}; use one of {', '.join(LEARNING_RATE_SCHEDULES)}"
        )

    def rate(iteration: int) -> float:
        if iteration < warmup_iterations:
            return peak * (iteration + 1) / warmup_iterations
        if schedule == "constant":
            return peak
        progress = (iteration - warmup_iterations) / max(1, iterations - warmup_iterations)
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return rate
