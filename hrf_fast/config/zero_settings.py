"""Settings of DeepSpeed: its JSON file checked against our configuration, and what we fill in.

A user writes the file's name in `engine.deepspeed`. Batch sizes, clipping, optimizer, precision and learning rate are
options of `train`, `optimizer` and `compute`; a file that says them too would say them twice, so it is refused.
Training and planning read the file here, so that one takes what the other takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hrf_fast.config.zero_keys import check_keys
from hrf_fast.registry import nearest

STAGES = (0, 1, 2, 3)
_OURS = {
    "train_batch_size": "train.groups_per_step and train.group_size",
    "train_micro_batch_size_per_gpu": "compute.images_per_call",
    "gradient_accumulation_steps": "train.groups_per_step",
    "managed_gradient_accumulation": "nothing: it must be off, since windows change the number of backwards",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.learning_rate, optimizer.weight_decay and optimizer.kwargs",
    "scheduler": "optimizer.learning_rate_schedule",
    "fp16": "compute.precision=fp16 (fp32 weights under autocast)",
    "bf16": "compute.precision=bf16 (fp32 weights under autocast; DeepSpeed's own bf16 is 25 % off at stage 0)",
    "torch_autocast": "compute.precision",
    "amp": "compute.precision",
    "activation_checkpointing": "compute.activations",
    "zero_allow_untested_optimizer": "nothing: it is set",
    "zero_force_ds_cpu_optimizer": "nothing: it is set",
}
# DeepSpeed ignores a key that it does not know, and we one that is like none of these
_OTHERS = (
    "zero_optimization",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "disable_python_gc",
    "disable_allgather",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "flops_profiler",
    "comms_logger",
    "tensorboard",
    "csv_monitor",
    "wandb",
    "comet",
    "timers",
    "compile",
    "checkpoint",
    "data_types",
    "aio",
    "log_level",
    "autotuning",
)
_LIKE = 0.8


def read_settings(file: str) -> dict[str, Any]:
    """The JSON file of engine.deepspeed, checked.

    Raises:
        ValueError: not a file of JSON, an unknown stage, a key of `zero_optimization` that does not exist or has a
            value of another type, offload without a stage that has it, or a key that is ours; names file and key.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"engine.deepspeed is {file!r}: no such file; use one of configs/deepspeed/, or null")
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except ValueError as error:
        raise ValueError(f"engine.deepspeed is {file!r}, which is not valid JSON: {error}") from error
    where = f"engine.deepspeed {file}:"
    for key in settings if isinstance(settings, dict) else ():
        if key not in (*_OTHERS, *_OURS) and (hint := nearest(key, (*_OTHERS, *_OURS), cutoff=_LIKE)):
            raise ValueError(f"{where} there is no {key}{hint}; DeepSpeed would ignore it")
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    if not isinstance(zero, dict):
        raise ValueError(f'engine.deepspeed is {file!r}, which lacks {{"zero_optimization": {{"stage": 0 to 3}}}}')
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in STAGES:
        raise ValueError(f"{where} zero_optimization.stage is {stage!r}; use one of {', '.join(map(str, STAGES))}")
    # "auto" is how other trainers' files leave a value to the trainer: to us, or to DeepSpeed's default
    settings = _without_auto(settings)
    zero = settings["zero_optimization"]
    check_keys(zero, where)
    if stage < 2 and zero.get("overlap_comm"):
        raise ValueError(f"{where} zero_optimization.overlap_comm needs stage 2 or 3, but stage is {stage}; remove it")
    if zero.get("compute_grad_norm") is False:
        raise ValueError(
            f"{where} zero_optimization.compute_grad_norm is false, but the norm tells whether a gradient is finite; "
            "remove it"
        )
    for key, option in _OURS.items():
        if key in settings:
            raise ValueError(f"{where} {key} is {settings[key]!r}, but that is said by {option}; remove it")
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        device = offload_device(zero, key)
        if device not in ("none", "cpu"):
            raise ValueError(f"{where} zero_optimization.{key}.device is {device!r}; use cpu, or none")
        if device == "cpu" and stage not in stages:
            raise ValueError(
                f"{where} zero_optimization.{key} needs stage {' or '.join(map(str, stages))}, but stage is {stage}; "
                f"raise the stage, or remove {key}"
            )
    _check_optimizers(zero, where)
    return settings


def _check_optimizers(zero: dict[str, Any], where: str) -> None:
    """Refuse what would have DeepSpeed train a part of the weights by another optimizer than ours."""
    offload = zero.get("offload_optimizer") or {}
    section = f"{where} zero_optimization"
    if (ratio := offload.get("ratio", 1)) != 1:
        raise ValueError(
            f"{section}.offload_optimizer.ratio is {ratio}: the part that stays on the GPU has a second optimizer of "
            "DeepSpeed's, which no learning rate would reach; remove it"
        )
    for name, value in (
        ("offload_optimizer.super_offload", offload.get("super_offload")),
        ("zenflow", zero.get("zenflow")),
    ):
        if value:
            raise ValueError(f"{section}.{name} is set: it brings an optimizer of DeepSpeed's; remove it")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON; a key that comes twice is refused, as DeepSpeed does."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(
            f"the key {next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1)!r} comes twice"
        )
    return values


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }


def offload_device(zero: dict[str, Any], key: str) -> str:
    """Where `offload_optimizer` or `offload_param` of a zero_optimization section puts things: none, cpu, …"""
    return str((zero.get(key) or {}).get("device", "none"))


def complete(settings: dict[str, Any], *, max_grad_norm: float) -> dict[str, Any]:
    """The settings with what DeepSpeed insists on and what its defaults get wrong for us."""
    stage = settings["zero_optimization"].get("stage", 0)
    return {
        # its default waits for the whole device before every forward, in sampling too
        "timers": {"throughput": {"enabled": False}},
        **settings,
        # stage 3 would put its own linear layer into torch for the whole process, which under autocast computes in
        # another precision, in the sampling too; it saves memory for frozen weights only
        "zero_optimization": {"memory_efficient_linear": False, **settings["zero_optimization"]},
        # samples are not DeepSpeed's to count: 1 says nothing and is consistent on any number of ranks
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # its default is 1.0; stage 0 is clipped by the engine
        "gradient_clipping": float(max_grad_norm) if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
