"""Checks: what the values of a configuration may be, alone and together.

As far as that can be said without the model; what depends on it (windows, schedulers) is checked when it is built,
before anything runs.
"""

from __future__ import annotations

from typing import Any

from hrf_fast.config.advantage_rules import check_advantages
from hrf_fast.config.amounts import parse_memory
from hrf_fast.config.options import FACTS, FLOW_SAMPLERS, Config, LoraConfig, SampleConfig
from hrf_fast.config.prompt_rules import check_prompt_options
from hrf_fast.config.reward_rules import check_reward_options
from hrf_fast.config.stop_rules import check_stop
from hrf_fast.config.zero_settings import offload_device, read_settings
from hrf_fast.registry import nearest

# bitsandbytes quantises their state
_8BIT = ("adamw_8bit", "paged_adamw_8bit")


def check_config(config: Config) -> None:
    """Refuse values out of range and combinations that can't work.

    Raises:
        ValueError: names the option, its value, the rule and the way out.
    """
    for option, facts in FACTS.items():
        section, name = option.split(".")
        facts.check(option, getattr(getattr(config, section), name))
    _check_sample(config.sample)
    train = config.train
    if train.groups_per_iteration % train.groups_per_step:
        raise ValueError(
            f"train.groups_per_step is {train.groups_per_step}, which does not divide train.groups_per_iteration "
            f"{train.groups_per_iteration}; choose a divisor"
        )
    _check_order(config)
    _check_fewer_calls(config)
    _check_tuning(config)
    _check_optimizer_kwargs(config.optimizer.kwargs)
    if (burn_in := config.optimizer.burn_in_iterations) >= train.iterations:
        raise ValueError(
            f"optimizer.burn_in_iterations is {burn_in} of train.iterations {train.iterations}: no weight would move; "
            "use fewer"
        )
    check_optimizer(config.optimizer.name, config.engine.deepspeed)
    _check_lora(config)
    _check_remedies(config)
    check_advantages(config)
    check_prompt_options(config)
    check_stop(config)
    check_reward_options(config)


def _check_sample(sample: SampleConfig) -> None:
    """Check that the noise option is that of the sampler."""
    kind = sample.scheduler
    if kind not in FLOW_SAMPLERS and sample.noise_level is not None:
        raise ValueError(
            f"sample.noise_level is {sample.noise_level:g} but sample.scheduler is {kind}, whose noise scale is "
            "sample.eta; leave noise_level out, or use a sampler of flow-matching models"
        )
    if kind in FLOW_SAMPLERS and sample.eta != SampleConfig().eta:
        raise ValueError(
            f"sample.eta is {sample.eta:g} but sample.scheduler is {kind}, whose noise scale is sample.noise_level; "
            "leave eta out"
        )
    if kind == "cps" and (sample.noise_level or 0) > 1:
        raise ValueError(f"sample.noise_level is {sample.noise_level:g}; cps takes at most 1")


def _check_lora(config: Config) -> None:
    """Check the options of adapters, and that there are none without adapters."""
    lora, precision = config.lora, config.compute.precision
    if not lora.rank:
        for name, default in vars(LoraConfig()).items():
            if (value := getattr(lora, name)) != default:
                raise ValueError(
                    f"lora.{name} is {value!r} but lora.rank is 0, which trains all weights and has no adapters; set "
                    f"lora.rank, or leave lora.{name} out"
                )
    if not lora.targets:
        raise ValueError("lora.targets is [], so nothing would be trained; name layers, such as [to_q, to_v]")
    if lora.base_precision not in ("fp32", precision):
        raise ValueError(
            f"lora.base_precision is {lora.base_precision} but compute.precision is {precision}: frozen weights are "
            f"stored in fp32 or in the precision that they compute in; use {lora.base_precision} for both, or fp32 "
            "for the weights"
        )


def _check_remedies(config: Config) -> None:
    """Check that every option of section remedies does something."""
    remedies, steps = config.remedies, config.sample.num_inference_steps
    if remedies.kl_weight_end is not None and (
        remedies.kl_weight_end == remedies.kl_weight or config.train.iterations == 1
    ):
        raise ValueError(
            f"remedies.kl_weight_end is {remedies.kl_weight_end:g} but remedies.kl_weight {remedies.kl_weight:g} and "
            f"train.iterations {config.train.iterations}, so the weight never changes; leave it out"
        )
    if remedies.reference_steps is not None:
        option = f"remedies.reference_steps is {remedies.reference_steps}"
        if not remedies.reference_penalty:
            raise ValueError(
                f"{option} but remedies.reference_penalty is 0, which no step has; set it, or leave it out"
            )
        if remedies.reference_steps > steps:
            raise ValueError(f"{option} but sample.num_inference_steps is {steps}; use at most that")


def _check_tuning(config: Config) -> None:
    """Check that nothing is set by hand which a measurement is to choose."""
    compute = config.compute
    for name, value, default in (("threads", compute.threads, 0), ("channels_last", compute.channels_last, False)):
        if compute.auto_tune and value != default:
            raise ValueError(
                f"compute.{name} is {value} but compute.auto_tune is true, which chooses it; leave one of them out"
            )


def _check_fewer_calls(config: Config) -> None:
    """Check what leaves network calls out."""
    steps, total = config.window.anchor_steps, config.sample.num_inference_steps
    if steps > total:
        raise ValueError(f"window.anchor_steps is {steps} but sample.num_inference_steps is {total}; use at most that")
    if config.train.skip_flat_groups and config.remedies.needs_reference:
        raise ValueError(
            "train.skip_flat_groups is true but section remedies has a term of the pretrained model, whose gradient is "
            "not zero in a group of equal rewards; set it to false"
        )


def _check_optimizer_kwargs(kwargs: dict[str, Any]) -> None:
    """Refuse options that AdamW does not have, and values out of its range."""
    for name in kwargs:
        if name not in ("betas", "eps"):
            raise ValueError(
                f"optimizer.kwargs.{name} is unknown{nearest(name, ('betas', 'eps'))}; it takes betas, eps"
            )
    betas, eps = kwargs.get("betas", [0, 0]), kwargs.get("eps", 1)
    if not isinstance(betas, list) or len(betas) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"optimizer.kwargs.betas is {betas!r}; use two numbers in [0, 1), such as [0.9, 0.999]")
    if not (is_number(eps) and 0 < eps < float("inf")):
        raise ValueError(f"optimizer.kwargs.eps is {eps!r}; use a finite number above 0, such as 1e-8")


def is_number(value: Any) -> bool:
    """Whether YAML has read a number, and not yes or no."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_order(config: Config) -> None:
    """Check what the order of updates and the keeping of graphs ask of each other."""
    train, compute = config.train, config.compute
    if compute.activations == "keep" and train.order != "on_policy":
        raise ValueError(
            f"compute.activations is keep but train.order is {train.order}: kept graphs must be used before the "
            "weights change; use train.order=on_policy, or compute.activations=replay"
        )
    if compute.activations == "keep" and train.inner_epochs > 1:
        raise ValueError(
            f"compute.activations is keep but train.inner_epochs is {train.inner_epochs}: a kept graph serves one "
            "epoch; use train.inner_epochs=1, or compute.activations=replay"
        )
    parted = train.order == "on_policy" and train.groups_per_step != train.groups_per_iteration
    apart = {"train.advantages": (train.advantages, "group"), "train.advantage_scale": (train.advantage_scale, "std")}
    for option, (value, alone) in apart.items():
        if parted and value not in (alone, "none"):
            raise ValueError(
                f"{option} is {value} but train.order is on_policy: peers must be rolled out together; "
                f"use train.groups_per_step={train.groups_per_iteration}, or train.order=collect"
            )
    if train.gradient_noise and train.groups_per_step % 2:
        raise ValueError(
            f"train.gradient_noise is true but train.groups_per_step is {train.groups_per_step}: signal and noise come "
            "from two halves of a step's groups; use an even number, or train.gradient_noise=false"
        )
    if train.gradient_noise and train.step_share < 1:
        raise ValueError(
            f"train.gradient_noise is true but train.step_share is {train.step_share:g}: both halves leave out the "
            "same steps, which would count as signal; use train.step_share=1, or train.gradient_noise=false"
        )
    if train.gradient_noise and config.engine.deepspeed is not None:
        raise ValueError(
            f"train.gradient_noise is true but engine.deepspeed is {config.engine.deepspeed}, which shards gradients "
            "as they come; use the plain engine (engine.deepspeed=null), or train.gradient_noise=false"
        )
    if compute.memory_budget is not None:
        parse_memory(compute.memory_budget, "compute.memory_budget")
        if compute.activations != "auto":
            raise ValueError(
                f"compute.memory_budget is {compute.memory_budget} but compute.activations is {compute.activations}, "
                "which plans nothing; use compute.activations=auto, or leave the budget out"
            )


def check_optimizer(name: str, deepspeed: str | None) -> None:
    """Refuse an optimizer that does not go with the engine of the configuration.

    Args:
        name: optimizer.name; deepspeed: engine.deepspeed, a JSON file or None.

    Raises:
        ValueError: cpu_adam where nothing is offloaded; 8-bit state where ZeRO would shard it.
    """
    if name not in ("cpu_adam", *_8BIT) or (deepspeed is None and name in _8BIT):
        return
    rule = f"optimizer.name is {name!r}, "
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
        if stage == 3 and config.compute.activations == "keep":
            raise ValueError(
                f"compute.activations is keep but {config.engine.deepspeed} is ZeRO-3, which takes the weights away "
                "after each forward; use replay, checkpoint or a stage up to 2"
            )
        if stage == 3 and config.compute.compile != "none":
            raise ValueError(
                f"compute.compile is {config.compute.compile!r}, but engine.deepspeed {config.engine.deepspeed} is "
                "ZeRO-3, whose hooks gather each layer's weights around its forward, and can't be compiled; use ZeRO 0 "
                "to 2, the plain engine (null), or compute.compile=none"
            )
    # groups_per_step divides groups_per_iteration
    if config.train.groups_per_step % world_size:
        raise ValueError(
            f"train.groups_per_step is {config.train.groups_per_step}, which {world_size} ranks can't share evenly (an "
            "optimizer step averages over its groups, and every rank takes as many of them); set it to a multiple of "
            f"{world_size} that divides train.groups_per_iteration {config.train.groups_per_iteration}, or launch "
            "another number of ranks"
        )
    if config.train.gradient_noise and config.train.groups_per_step // world_size % 2:
        raise ValueError(
            f"train.gradient_noise is true but train.groups_per_step is {config.train.groups_per_step} on {world_size} "
            f"ranks: every rank's groups must halve; use a multiple of {2 * world_size}, or train.gradient_noise=false"
        )
    if world_size > 1 and config.run.device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"run.device is {config.run.device!r} but there are {world_size} ranks; use auto, cuda or cpu: each rank "
            "takes the GPU of its LOCAL_RANK"
        )
