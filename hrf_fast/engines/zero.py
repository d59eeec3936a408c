"""DeepSpeedEngine: ZeRO stages 0 to 3 behind the Engine protocol, driven in the one way that is exact for all of them.

The number of backwards per optimizer step changes every iteration, so DeepSpeed must not count them:
`managed_gradient_accumulation: false` makes `step()` the boundary. Gradients then equal those of one process to 1e-7 at
every stage as long as each forward is followed by its backward; kept graphs (all forwards first) are right at stages 0
to 2 and silently wrong at 3, where the losses must be summed into one backward.

Left out: DeepSpeed's own checkpoints, which are pickles. Whole weights and optimizer states are gathered instead, one
tensor at a time, in the format of the plain engine; so a run resumes with another stage or another number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hrf_fast.config.options import OptimizerConfig
from hrf_fast.config.zero_settings import complete, offload_device
from hrf_fast.devices import deterministic_backward
from hrf_fast.distributed import comm
from hrf_fast.engines.base import Ema, LossScale, averaged, trained_weights
from hrf_fast.engines.optimizers import build_optimizer, flatten_optimizer, restore_optimizer
from hrf_fast.engines.zero_setup import check_settings, import_deepspeed, on_device

# AdamW's elementwise states
_STATES = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """AdamW under ZeRO; `forward` is what a policy calls where gradients are wanted."""

    def __init__(
        self, model: nn.Module, settings: dict[str, Any], optimizer: OptimizerConfig, precision: str = "fp32"
    ) -> None:
        """Shard `model`; `settings` are those that `read_settings` has checked."""
        deepspeed = import_deepspeed(next(model.parameters()).device)
        self.model, self.max_grad_norm = model, optimizer.max_grad_norm
        self.stage = int(settings["zero_optimization"].get("stage", 0))
        self.lockstep = self.stage >= 2
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        device = self.parameters[0].device
        # offloaded weights are stepped on the CPU
        offloads = ("offload_optimizer", "offload_param")
        fuses = all(offload_device(settings["zero_optimization"], key) == "none" for key in offloads)
        self.optimizer = build_optimizer(optimizer, self.parameters, device=device, fuses=fuses)
        settings = complete(settings, max_grad_norm=optimizer.max_grad_norm)
        check_settings(settings)
        with on_device(device):
            self.module, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=settings)
        self.zero: Any = self.module.optimizer if self.stage else None
        # losses of kept graphs, and the inputs of the last forward: two rows, to make padding of
        self._kept: list[Tensor] = []
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self.loss_scale = LossScale(precision)
        self._norm = torch.zeros(())
        if not self.stage:
            # stage 0 reduces inside step(): this is the only place between that and the optimizer
            self.optimizer.register_step_pre_hook(self._before_step)
        self.ema = Ema(self._held(), optimizer.ema_decay)

    def _held(self) -> list[Tensor]:
        """This rank's part of each trained weight: all of it, or at stage 3 its shard."""
        parameters: list[Any] = self.parameters
        return [p.ds_tensor for p in parameters] if self.stage == 3 else parameters

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        if self.zero and self.loss_scale.dynamic:
            self.zero.override_loss_scale(self.loss_scale.value)
        yield

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Call the sharded network; its hooks gather the weights that each layer needs."""
        self._inputs = tuple(map(_two_rows, inputs)), {name: _two_rows(value) for name, value in named.items()}
        return self.module(*inputs, **named)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor, *, kept: bool = False) -> None:
        if kept and self.lockstep:
            # ranks keep different numbers of graphs: the backward of their sum is one on every rank
            self._kept.append(loss)
        else:
            # from stage 1 on, ZeRO multiplies by its scale itself
            with deterministic_backward():
                self.module.backward(loss if self.zero else loss * self.loss_scale.value)

    def gradients(self) -> list[Tensor]:
        raise NotImplementedError("DeepSpeed shards gradients as they come; config.rules refuses what asks for them")

    def finish(self, padding: int) -> None:
        """Run the one backward of all kept graphs, then `padding` forwards of weight 0 with their backwards."""
        if self._kept:
            loss = torch.stack(self._kept).sum()
            self._kept = []
            self.backward(loss)
        inputs, named = self._inputs
        for _ in range(padding if self.lockstep else 0):
            self.backward(0 * self.module(*inputs, **named).sum())

    def step(self) -> Tensor:
        """One AdamW step.

        Raises:
            FloatingPointError: a gradient is not finite; the weights are as they were, on every rank.
        """
        self.module.step()
        norm = torch.as_tensor(self.zero._global_grad_norm) if self.zero else self._norm
        self.loss_scale.check(norm)
        self.ema.update(self._held(), self.module.optimizer.param_groups[0]["lr"])
        return norm.float()

    def _before_step(self, *_: Any) -> None:
        """Clip; drop all gradients where one is not finite, so that the step is a no-op, as from stage 1 on."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= self.loss_scale.value
        self._norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf)
        if not torch.isfinite(self._norm):
            for parameter in self.parameters:
                parameter.grad = None

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.module.optimizer.param_groups:
            group["lr"] = learning_rate

    @contextmanager
    def gathered(self, *, ema: bool = False) -> Iterator[None]:
        if self.stage < 3:
            with averaged(self.parameters, self.ema.parts if ema else []):
                yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        parameters, offload = list(self.model.parameters()), self.zero.parameter_offload
        with GatheredParameters(parameters):
            for parameter, part in zip(self.parameters if ema and self.ema.parts else [], self.ema.parts, strict=ema):
                # thrown away with the gathered copy; the shards stay as they are
                parameter.data.copy_(self._whole(parameter, part))
            # the hooks would gather and release each layer at each forward
            offload._remove_module_hooks()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload.setup_zero_stage3_hooks()

    def _whole(self, parameter: Any, part: Tensor) -> Tensor:
        """The tensor of a weight's shape whose shards the ranks hold."""
        return comm.gather_rows(part.to(parameter.device).flatten())[: parameter.ds_numel].view(parameter.ds_shape)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        trained = trained_weights(self.model)
        return {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in trained.items()}

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in trained_weights(self.model).items()}

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not self.zero:
            tensors, groups = flatten_optimizer(self.optimizer)
            return tensors, {"optimizer_scalars": groups, **self.loss_scale.state(), "ema_steps": self.ema.steps}
        from deepspeed.utils import safe_get_full_optimizer_state

        # ZeRO has flattened the weights; here they have their own indices again, as in the plain engine
        group = self.optimizer.param_groups[0] | {"params": list(range(len(self.parameters)))}
        tensors, states = {}, list(self.optimizer.state.values())
        for index, parameter in enumerate(self.parameters if states else []):
            for key in _STATES:
                state = safe_get_full_optimizer_state(parameter, key)
                if comm.is_main():
                    tensors[f"{index}.{key}"] = state.cpu()
            # torch counts steps in a tensor, DeepSpeed's own Adam in an int
            tensors[f"{index}.step"] = torch.as_tensor(states[0]["step"], dtype=torch.float32).clone()
        return tensors, {"optimizer_scalars": [group], **self.loss_scale.state(), "ema_steps": self.ema.steps}

    def ema_state(self) -> dict[str, Tensor]:
        averages = {}
        trained = trained_weights(self.model)
        for (name, parameter), part in zip(trained.items(), self.ema.parts, strict=bool(self.ema.parts)):
            value = self._whole(parameter, part) if self.stage == 3 else part
            if comm.is_main():
                averages[name] = value.cpu()
        return averages

    def load(
        self,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        numbers: dict[str, Any],
        ema: Mapping[str, Tensor],
    ) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        self.loss_scale.load(numbers)
        self.ema.steps = numbers["ema_steps"]
        named = dict(self.model.named_parameters())
        for name, value in comm.broadcast_tensors(weights):
            with GatheredParameters([named[name]], modifier_rank=0), torch.no_grad():
                named[name].copy_(value)
            if self.zero and named[name].requires_grad:
                self._set(named[name], value, None)
        self.ema.parts = [part.detach().clone() for part in self._held()] if self.ema.decay else []
        if not self.zero:
            restore_optimizer(self.optimizer, dict(comm.broadcast_tensors(optimizer)), numbers["optimizer_scalars"])
        else:
            self._make_states(float(comm.broadcast(optimizer["0.step"] if optimizer else 0.0)))
            for name, value in comm.broadcast_tensors(optimizer):
                index, key = name.split(".", 1)
                if key in _STATES:
                    self._set(self.parameters[int(index)], value, key)
        parts = dict(zip(trained_weights(self.model), self.ema.parts, strict=bool(self.ema.parts)))
        for name, value in comm.broadcast_tensors(ema):
            if name in parts:
                parts[name].copy_(self._part(named[name], value))

    def _set(self, parameter: Any, whole: Tensor, key: str | None) -> None:
        """Write a weight's fp32 original, or with `key` its optimizer state, into what this rank holds of it."""
        if self.stage == 3:
            # DeepSpeed's own setter fails where the ranks do not divide a weight's size
            held, _ = self.zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=True, optim_state_key=key)
            held.data.copy_(self._part(parameter, whole).flatten())
        else:
            parameter.set_full_hp_param(whole, key)

    def _part(self, parameter: Any, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor; the last ranks' shards are padded."""
        if self.stage < 3:
            return whole
        size = parameter.ds_tensor.numel()
        padded = nn.functional.pad(whole.flatten(), (0, size * comm.world_size() - whole.numel()))
        return padded[comm.rank() * size :][:size].view_as(parameter.ds_tensor)

    def _make_states(self, step: float) -> None:
        """The state that the inner optimizer would make at its first step, to be filled."""
        partitions = (
            self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        )
        counts_in_int = type(self.optimizer).__name__ == "DeepSpeedCPUAdam"
        # the fused form counts where the weights are
        fused = self.optimizer.param_groups[0].get("fused")
        for flat in partitions if step else []:
            self.optimizer.state[flat] = {
                "step": int(step) if counts_in_int else torch.tensor(step, device=flat.device if fused else None),
                **{key: torch.zeros_like(flat, requires_grad=False) for key in _STATES},
            }
        if step and self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()


def _two_rows(value: Any) -> Any:
    """A copy of the first two samples of a network's input; a batch of one would be another compiled graph."""
    return value[:2].detach().clone() if isinstance(value, Tensor) and value.dim() else value
