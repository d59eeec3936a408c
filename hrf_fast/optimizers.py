"""Optimizers by name: torch's AdamW, its fused form, DeepSpeed's for offload, and bitsandbytes' with 8-bit state.

All are AdamW with decoupled weight decay. What this machine can't run is refused when it is built, before a run begins.
Packages are imported inside, since config.py takes its rule from here and imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hrf_fast.deepspeed_settings import offload_device, read_settings
from hrf_fast.options import OPTIMIZERS
from hrf_fast.registry import nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
# bitsandbytes keeps the state of smaller tensors in fp32
_LEAST_8BIT = 4096


def check_optimizer(name: str, deepspeed: str | None) -> None:
    """Refuse an optimizer that does not go with the engine of the configuration.

    Args:
        name: train.optimizer; deepspeed: engine.deepspeed, a JSON file or None.

    Raises:
        ValueError: cpu_adam where nothing is offloaded; 8-bit state where ZeRO would shard it.
    """
    if name not in ("cpu_adam", *_BITSANDBYTES) or (deepspeed is None and name in _BITSANDBYTES):
        return
    rule = f"train.optimizer is {name!r}, "
    if deepspeed is None:
        raise ValueError(
            f"{rule}which updates weights that ZeRO has offloaded to the CPU, but engine.deepspeed is null; set it to "
            "a file that offloads, or use adamw"
        )
    zero = read_settings(deepspeed)["zero_optimization"]
    if name == "cpu_adam" and offload_device(zero, "offload_optimizer") == "none":
        raise ValueError(
            f"{rule}but {deepspeed} has no zero_optimization.offload_optimizer with device cpu; add it, or use adamw"
        )
    if name in _BITSANDBYTES and zero.get("stage", 0):
        raise ValueError(
            f"{rule}but {deepspeed} shards the optimizer, and quantised shards can't be gathered into a checkpoint; "
            "use adamw, whose state ZeRO divides by the number of GPUs, or stage 0"
        )


def build_optimizer(
    name: str,
    parameters: Sequence[nn.Parameter],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    device: torch.device,
) -> torch.optim.Optimizer:
    """The optimizer of train.optimizer, with learning rate 0 until one is set.

    Args:
        name: adamw; fused_adamw, one kernel for all tensors; cpu_adam, DeepSpeed's for offloaded weights; adamw_8bit,
            2 bytes of state a weight instead of 8; paged_adamw_8bit, the same in memory that CUDA may move to the host.
        device: where the model computes.

    Raises:
        ImportError: its package is missing; says how to install it.
        ValueError: this machine can't run it; says why and what to use.
    """
    import torch

    settings: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if name in ("adamw", "fused_adamw"):
        return torch.optim.AdamW(parameters, **settings, fused=True if name == "fused_adamw" else None)
    if name == "cpu_adam":
        return _deepspeed_cpu_adam(parameters, settings)
    if name not in _BITSANDBYTES:
        raise ValueError(f"train.optimizer is {name!r}{nearest(name, OPTIMIZERS)}; use {', '.join(OPTIMIZERS)}")
    if name == "paged_adamw_8bit" and device.type != "cuda":
        raise ValueError(
            f"train.optimizer is {name!r}, whose paging is CUDA's, but the device is {device}; use adamw_8bit or adamw"
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
            f"train.optimizer is {name!r}, but bitsandbytes {bitsandbytes.__version__} can't step on {device} "
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
            f"train.optimizer is 'cpu_adam', but DeepSpeed can't build its kernel ({type(cause).__name__}: "
            f"{cause}); install g++ and ninja, or use adamw"
        ) from error


def _require(name: str, package: str) -> None:
    if find_spec(package) is None:
        raise ImportError(f'train.optimizer is {name!r}: `pip install "hrf_fast[gpu]"` brings {package}; or use adamw')
