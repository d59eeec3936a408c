"""Optimizers by name: torch's AdamW, its fused form, DeepSpeed's for offload, and bitsandbytes' with 8-bit state.

All are AdamW with decoupled weight decay. What this machine can't run is refused when it is built, before a run begins.
The state of an optimizer as flat tensors, and the learning rate over a run, are here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from hrf_fast.config.options import LEARNING_RATE_SCHEDULES, OPTIMIZERS, OptimizerConfig
from hrf_fast.registry import nearest
from hrf_fast.weights import compare, not_finite

_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
# bitsandbytes keeps the state of smaller tensors in fp32
_LEAST_8BIT = 4096


def build_optimizer(
    config: OptimizerConfig, parameters: Sequence[nn.Parameter], *, device: torch.device, fuses: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that optimizer.name names, with learning rate 0 until one is set.

    Args:
        config: by its name adamw; fused_adamw, one kernel for all tensors; cpu_adam, DeepSpeed's for offloaded weights;
            adamw_8bit, 2 bytes of state a weight instead of 8; paged_adamw_8bit, the same in memory that CUDA may move
            to the host.
        device: where the model computes.
        fuses: take torch's fused form for adamw where all parameters are on CUDA; they must stay there.

    Raises:
        ImportError: its package is missing; says how to install it.
        ValueError: this machine can't run it; says why and what to use.
    """
    name, decay = config.name, config.weight_decay
    settings: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps, "weight_decay": decay}
    if name in ("adamw", "fused_adamw"):
        fused = name == "fused_adamw" or (fuses and all(parameter.is_cuda for parameter in parameters))
        return torch.optim.AdamW(parameters, **settings, fused=True if fused else None)
    if name == "cpu_adam":
        return _deepspeed_cpu_adam(parameters, settings)
    if name not in _BITSANDBYTES:
        raise ValueError(f"optimizer.name is {name!r}{nearest(name, OPTIMIZERS)}; use {', '.join(OPTIMIZERS)}")
    if name == "paged_adamw_8bit" and device.type != "cuda":
        raise ValueError(
            f"optimizer.name is {name!r}, whose paging is CUDA's, but the device is {device}; use adamw_8bit or adamw"
        )
    _require(name, "bitsandbytes")
    import bitsandbytes

    kind = getattr(bitsandbytes.optim, _BITSANDBYTES[name])
    trial = torch.nn.Parameter(torch.zeros(_LEAST_8BIT, device=device))
    trial.grad = torch.ones_like(trial)
    try:
        kind([trial]).step()
    # whatever its native library lacks for this device
    except Exception as error:
        raise ValueError(
            f"optimizer.name is {name!r}, but bitsandbytes {bitsandbytes.__version__} can't step on {device} "
            f"({type(error).__name__}: {error}); upgrade it, or use adamw"
        ) from error
    return kind(parameters, **settings)


def _deepspeed_cpu_adam(parameters: Sequence[nn.Parameter], settings: dict[str, Any]) -> torch.optim.Optimizer:
    _require("cpu_adam", "deepspeed")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return DeepSpeedCPUAdam(parameters, **settings)
    # its kernel is compiled on first use: no compiler, no ninja, or a compile that failed
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"optimizer.name is 'cpu_adam', but DeepSpeed can't build its kernel ({type(cause).__name__}: "
            f"{cause}); install g++ and ninja, or use adamw"
        ) from error


def _require(name: str, package: str) -> None:
    if find_spec(package) is None:
        raise ImportError(f'optimizer.name is {name!r}: `pip install "hrf_fast[gpu]"` brings {package}; or use adamw')


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Optimizer state as flat tensors named "index.key", and its groups' numbers."""
    # not the 8-bit optimizers' own state_dict, which nests the state for FSDP
    state = torch.optim.Optimizer.state_dict(optimizer)
    tensors: dict[str, Tensor] = {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            # 8-bit state shares its quantisation maps, which safetensors refuses, and counts its steps in an int
            shared = key.startswith("qmap")
            tensor = torch.as_tensor(value)
            tensors[f"{index}.{key}"] = tensor.clone() if shared else contiguous_copy(tensor)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, weight in enumerate(weights if any(name.endswith(".exp_avg") for name in tensors) else []):
        # one that no call has used yet, in the state that its first step would begin with
        if index not in state["state"]:
            zeros = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            tensors |= {f"{index}.{moment}": zeros.clone() for moment in ("exp_avg", "exp_avg_sq")}
            tensors[f"{index}.step"] = torch.zeros(())
    return tensors, state["param_groups"]


def contiguous_copy(tensor: Tensor) -> Tensor:
    """The tensor as safetensors takes it; what has another order, as of channels-last weights, is copied on the CPU."""
    return tensor if tensor.is_contiguous() else tensor.cpu().contiguous()


def judge_state(tensors: Mapping[str, Tensor], shapes: Sequence[Sequence[int]]) -> str:
    """The problem with tensors as `flatten_optimizer` gives them for weights of these shapes; empty where they fit.

    Before the first step an optimizer has none.
    """
    if not tensors:
        return ""
    # bitsandbytes' names
    quantised = [key for key in ("state1", "state2") if any(name.endswith(f".{key}") for name in tensors)]
    moments = quantised or ["exp_avg", "exp_avg_sq"]
    needed: dict[str, Sequence[int]] = {}
    for index, shape in enumerate(shapes):
        if quantised and not any(name.startswith(f"{index}.") for name in tensors):
            # no call has used this weight yet, and its first step begins its state
            continue
        needed |= {f"{index}.{moment}": shape for moment in moments} | {f"{index}.step": ()}
    # which keeps maps and maxima of blocks besides
    present = {name: tensor.shape for name, tensor in tensors.items() if name in needed or not quantised}
    return compare(needed, present) or not_finite(tensors)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """The inverse of `flatten_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value.item() if value.dtype == torch.int64 else value
    # how it computes is this machine's: a checkpoint may come from one without a GPU
    (now,) = optimizer.param_groups
    here = {name: now[name] for name in ("fused", "foreach", "capturable") if name in now}
    # JSON has no tuples
    groups = [group | {"betas": tuple(group["betas"])} | here for group in groups]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():
            # files are contiguous, a channels_last weight and its state are not: mixed, they would round otherwise
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entry[key] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def learning_rate_at(
    schedule: str, *, peak: float, warmup_iterations: int, iterations: int, burn_in_iterations: int = 0
) -> Callable[[int], float]:
    """Learning rate as a function of the iteration: zero, linear warm-up, then constant or cosine down to zero.

    At zero AdamW's moments are averaged and no weight moves, so that the first step is not a sign of one gradient.

    Args:
        schedule: constant or cosine; peak: the rate after warm-up; iterations: length of the run.
    """
    if schedule not in LEARNING_RATE_SCHEDULES:
        raise ValueError(
            f"optimizer.learning_rate_schedule is {schedule!r}; use one of {', '.join(LEARNING_RATE_SCHEDULES)}"
        )

    warmed_up = burn_in_iterations + warmup_iterations

    def rate(iteration: int) -> float:
        if iteration < burn_in_iterations:
            return 0.0
        if iteration < warmed_up:
            return peak * (iteration - burn_in_iterations + 1) / warmup_iterations
        if schedule == "constant":
            return peak
        progress = (iteration - warmed_up) / max(1, iterations - warmed_up)
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return rate
