"""Checks: what the values of a configuration may be, alone and together.

As far as that can be said without the model; what depends on it (windows, schedulers) is checked when it is built,
before anything runs.
"""

from __future__ import annotations

from typing import Any

from hrf_fast.config.amounts import parse_memory
from hrf_fast.config.options import (
    ACTIVATIONS,
    ATTENTIONS,
    COMPILES,
    KERNELS,
    LEARNING_RATE_SCHEDULES,
    OPTIMIZERS,
    ORDERS,
    PRECISIONS,
    SAMPLERS,
    Config,
    TrainConfig,
)
from hrf_fast.config.zero_settings import offload_device, read_settings
from hrf_fast.registry import nearest

# least value of every number; a choice of every named option
_AT_LEAST = {
    "sample.num_inference_steps": 1,
    "sample.batch_size": 1,
    "train.iterations": 1,
    "train.groups_per_iteration": 1,
    "train.group_size": 2,
    "train.groups_per_step": 1,
    "train.inner_epochs": 1,
    "train.warmup_iterations": 0,
    "train.weight_decay": 0,
    "train.max_grad_norm": 0,
    "train.micro_batch_size": 0,
    "train.max_batch": 0,
    "train.steps_per_forward": 1,
    "train.max_evaluations": 0,
    "evaluation.every": 0,
    "evaluation.panel_size": 2,
    "evaluation.seed": 0,
    "evaluation.grid_size": 1,
    "evaluation.resamples": 100,
    "run.seed": 0,
    "run.save_every": 0,
    "run.keep_checkpoints": 1,
}
_ABOVE_ZERO = (
    "train.learning_rate",
    "train.clip_range",
    "train.advantage_clip",
    "train.advantage_floor",
    "train.adam_eps",
)
_CHOICES = {
    "model.attention": ATTENTIONS,
    "sample.scheduler": SAMPLERS,
    "train.advantages": ("group", "batch"),
    "train.learning_rate_schedule": LEARNING_RATE_SCHEDULES,
    "train.precision": PRECISIONS,
    "train.kernels": KERNELS,
    "train.activations": ACTIVATIONS,
    "train.order": ORDERS,
    "train.compile": COMPILES,
    "train.self_check": ("warn", "strict"),
    "train.on_nan": ("stop", "skip"),
    "train.optimizer": OPTIMIZERS,
    "run.progress": ("auto", "bar", "json", "quiet"),
}
# noise.py makes keys of 32 bits
_LARGEST_SEED = 2**32 - 1
# bitsandbytes quantises their state
_8BIT = ("adamw_8bit", "paged_adamw_8bit")
WRITERS = ("tensorboard", "wandb")


def check_config(config: Config) -> None:
    """Refuse values out of range and combinations that can't work.

    Raises:
        ValueError: names the option, its value, the rule and the way out.
    """

    def value(option: str) -> Any:
        section, name = option.split(".")
        return getattr(getattr(config, section), name)

    for option, least in _AT_LEAST.items():
        # written so that NaN fails too
        if not value(option) >= least:
            raise ValueError(f"{option} is {value(option)}; use at least {least}")
        if value(option) == float("inf"):
            raise ValueError(f"{option} is inf; use a finite number")
    for option in ("run.seed", "evaluation.seed"):
        if value(option) > _LARGEST_SEED:
            raise ValueError(f"{option} is {value(option)}; use at most {_LARGEST_SEED} (2^32 - 1)")
    for option in _ABOVE_ZERO:
        if not 0 < value(option) < float("inf"):
            raise ValueError(f"{option} is {value(option)}; use a finite number above 0")
    for option, choices in _CHOICES.items():
        if value(option) not in choices:
            raise ValueError(
                f"{option} is {value(option)!r}{nearest(value(option), choices)}; use {', '.join(choices)}"
            )
    train = config.train
    if train.groups_per_iteration % train.groups_per_step:
        raise ValueError(
            f"train.groups_per_step is {train.groups_per_step}, which does not divide train.groups_per_iteration "
            f"{train.groups_per_iteration}; choose a divisor"
        )
    _check_order(train)
    if len(train.adam_betas) != 2 or not all(0 <= beta < 1 for beta in train.adam_betas):
        raise ValueError(f"train.adam_betas is {list(train.adam_betas)}; use two numbers in [0, 1)")
    check_optimizer(train.optimizer, config.engine.deepspeed)
    for writer in config.run.writers:
        if writer not in WRITERS:
            raise ValueError(f"run.writers has {writer!r}{nearest(writer, WRITERS)}; use {', '.join(WRITERS)}")
    if bool(config.reward.name) == bool(config.reward.terms):
        raise ValueError("set either reward.name or reward.terms (with reward.name=null), not both and not neither")
    if not 0 <= train.ema_decay < 1:
        raise ValueError(f"train.ema_decay is {train.ema_decay}; use a number in [0, 1), such as 0.999, or 0 for none")


def _check_order(train: TrainConfig) -> None:
    """What the order of updates, the batches of rollouts and the keeping of graphs ask of each other."""
    if train.activations == "keep" and train.order != "on_policy":
        raise ValueError(
            f"train.activations is keep but train.order is {train.order}: kept graphs must be used before the weights "
            "change; use train.order=on_policy, or train.activations=replay"
        )
    if train.activations == "keep" and train.inner_epochs > 1:
        raise ValueError(
            f"train.activations is keep but train.inner_epochs is {train.inner_epochs}: a kept graph serves one epoch; "
            "use train.inner_epochs=1, or train.activations=replay"
        )
    if train.activations == "keep" and train.steps_per_forward > 1:
        raise ValueError(
            f"train.activations is keep but train.steps_per_forward is {train.steps_per_forward}, which joins steps of "
            "a replay: kept steps are not replayed; use train.steps_per_forward=1, or train.activations=replay"
        )
    parted = train.order == "on_policy" and train.groups_per_step != train.groups_per_iteration
    if train.advantages == "batch" and parted:
        raise ValueError(
            "train.advantages is batch but train.order is on_policy: peers must be rolled out together; use "
            f"train.groups_per_step={train.groups_per_iteration}, or train.order=collect"
        )
    if 0 < train.max_batch < train.group_size:
        raise ValueError(
            f"train.max_batch is {train.max_batch} but train.group_size is {train.group_size}: it joins whole groups; "
            "use at least that, 0 for one by one, or split groups by train.micro_batch_size"
        )
    if train.max_batch and 0 < train.micro_batch_size < train.group_size:
        raise ValueError(
            f"train.max_batch is {train.max_batch}, which joins groups, but train.micro_batch_size is "
            f"{train.micro_batch_size}, which splits them; set one of them to 0"
        )
    if train.memory_budget is not None:
        parse_memory(train.memory_budget, "train.memory_budget")
        if train.activations != "auto":
            raise ValueError(
                f"train.memory_budget is {train.memory_budget} but train.activations is {train.activations}, which "
                "plans nothing; use train.activations=auto, or leave the budget out"
            )


def check_optimizer(name: str, deepspeed: str | None) -> None:
    """Refuse an optimizer that does not go with the engine of the configuration.

    Args:
        name: train.optimizer; deepspeed: engine.deepspeed, a JSON file or None.

    Raises:
        ValueError: cpu_adam where nothing is offloaded; 8-bit state where ZeRO would shard it.
    """
    if name not in ("cpu_adam", *_8BIT) or (deepspeed is None and name in _8BIT):
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
    if name in _8BIT and zero.get("stage", 0):
        raise ValueError(
            f"{rule}but {deepspeed} shards the optimizer, and quantised shards can't be gathered into a checkpoint; "
            "use adamw, whose state ZeRO divides by the number of GPUs, or stage 0"
        )


def check_job(config: Config, world_size: int) -> None:
    """Refuse a configuration that the ranks of a job can't share evenly, or a DeepSpeed file that can't work.

    Raises:
        ValueError: names the option, its value and the way out.
    """
    if config.engine.deepspeed is not None:
        stage = read_settings(config.engine.deepspeed)["zero_optimization"].get("stage", 0)
        if stage == 3 and config.train.activations == "keep":
            raise ValueError(
                f"train.activations is keep but {config.engine.deepspeed} is ZeRO-3, which takes the weights away "
                "after each forward; use replay, checkpoint or a stage up to 2"
            )
        if stage == 3 and config.train.compile != "none":
            raise ValueError(
                f"train.compile is {config.train.compile!r}, but engine.deepspeed {config.engine.deepspeed} is ZeRO-3, "
                "whose hooks gather each layer's weights around its forward, and can't be compiled; use ZeRO 0 to 2, "
                "the plain engine (null), or train.compile=none"
            )
    # groups_per_step divides groups_per_iteration
    if config.train.groups_per_step % world_size:
        raise ValueError(
            f"train.groups_per_step is {config.train.groups_per_step}, which {world_size} ranks can't share evenly (an "
            "optimizer step averages over its groups, and every rank takes as many of them); set it to a multiple of "
            f"{world_size} that divides train.groups_per_iteration {config.train.groups_per_iteration}, or launch "
            "another number of ranks"
        )
    train = config.train
    if train.order == "on_policy" and train.groups_per_step == world_size and train.max_batch >= 2 * train.group_size:
        raise ValueError(
            f"train.max_batch is {train.max_batch}, which joins the groups that a rank rolls out together, but with "
            f"train.order=on_policy and train.groups_per_step={train.groups_per_step} that is one; use more groups per "
            "step, train.order=collect, or train.max_batch=0"
        )
    if world_size > 1 and config.run.device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"run.device is {config.run.device!r} but there are {world_size} ranks; use auto, cuda or cpu: each rank "
            "takes the GPU of its LOCAL_RANK"
        )
