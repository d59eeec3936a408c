"""PlainEngine: whole weights on every rank, data-parallel by one flat all_reduce of the gradients.

A wrapper such as torch's DDP reduces in each backward, and is wrong when several forwards come before the first
backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hrf_fast.config.options import OptimizerConfig
from hrf_fast.devices import deterministic_backward
from hrf_fast.distributed import comm
from hrf_fast.engines.base import Ema, LossScale, averaged, trained_weights
from hrf_fast.engines.optimizers import build_optimizer, flatten_optimizer, restore_optimizer


class PlainEngine:
    """AdamW on whole weights, one copy of them on each rank."""

    lockstep = False

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig, precision: str = "fp32") -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.max_grad_norm = optimizer.max_grad_norm
        device = next(model.parameters()).device
        self.optimizer = build_optimizer(optimizer, self.parameters, device=device, fuses=True)
        self.loss_scale = LossScale(precision)
        self.ema = Ema(self.parameters, optimizer.ema_decay)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        self.optimizer.zero_grad(set_to_none=True)
        yield

    def backward(self, loss: Tensor, *, kept: bool = False) -> None:
        with deterministic_backward():
            (loss * self.loss_scale.value).backward()

    def gradients(self) -> list[Tensor]:
        # a weight that no call has used has none
        return [torch.zeros_like(p) if p.grad is None else p.grad / self.loss_scale.value for p in self.parameters]

    def finish(self, padding: int) -> None:
        """Do nothing: no rank waits for another before `step`."""

    def step(self) -> Tensor:
        """One AdamW step.

        Raises:
            FloatingPointError: a gradient is not finite; the weights are as they were.
        """
        gradients = self._averaged()
        if self.loss_scale.value != 1:
            torch._foreach_div_(gradients, self.loss_scale.value)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf)
        self.loss_scale.check(norm)
        self.optimizer.step()
        self.ema.update(self.parameters, self.optimizer.param_groups[0]["lr"])
        return norm

    def _averaged(self) -> list[Tensor]:
        """The gradients, averaged over ranks; a weight that one rank has not used counts as 0 there.

        A weight that no rank has used keeps none, so that the optimizer leaves it alone.
        """
        if comm.world_size() > 1:
            unused = [parameter for parameter in self.parameters if parameter.grad is None]
            used = torch.tensor([float(parameter.grad is not None) for parameter in self.parameters])
            used = used.to(self.parameters[0].device, non_blocking=True)
            for parameter in unused:
                parameter.grad = torch.zeros_like(parameter)
            # one collective for all: ranks whose windows differ may have used other weights
            comm.average([*(p.grad for p in self.parameters if p.grad is not None), used])
            if unused:
                for parameter, share in zip(self.parameters, used.tolist(), strict=True):
                    parameter.grad = parameter.grad if share else None
        return [p.grad for p in self.parameters if p.grad is not None]

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    @contextmanager
    def gathered(self, *, ema: bool = False) -> Iterator[None]:
        with averaged(self.parameters, self.ema.parts if ema else []):
            yield

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.weights().items()}

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in trained_weights(self.model).items()}

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, groups = flatten_optimizer(self.optimizer)
        return tensors, {"optimizer_scalars": groups, **self.loss_scale.state(), "ema_steps": self.ema.steps}

    def ema_state(self) -> dict[str, Tensor]:
        return dict(zip(trained_weights(self.model), self.ema.parts, strict=bool(self.ema.parts)))

    def load(
        self,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        numbers: dict[str, Any],
        ema: Mapping[str, Tensor],
    ) -> None:
        trained = self.weights()
        with torch.no_grad():
            for name, value in comm.broadcast_tensors(weights):
                trained[name].copy_(value)
        restore_optimizer(self.optimizer, dict(comm.broadcast_tensors(optimizer)), numbers["optimizer_scalars"])
        self.loss_scale.load(numbers)
        self.ema.steps = numbers["ema_steps"]
        saved = dict(comm.broadcast_tensors(ema))
        for name, part in zip(trained, self.ema.parts, strict=bool(self.ema.parts)):
            part.copy_(saved.get(name, trained[name]))
