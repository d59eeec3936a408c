"""Model: the policy of a configuration, loaded or the user's own, and the engine that owns its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hrf_fast.config.load import differences
from hrf_fast.config.options import FACTS, Config
from hrf_fast.config.zero_settings import read_settings
from hrf_fast.devices import choose_device, set_up
from hrf_fast.engines.base import Engine
from hrf_fast.engines.plain import PlainEngine
from hrf_fast.policies.base import Policy
from hrf_fast.policies.load import load_policy
from hrf_fast.policies.lora import LORA_WEIGHTS, add_adapters, load_adapters
from hrf_fast.policies.option_checks import FOR_PROMPTS, FOR_UNETS
from hrf_fast.weights import digest

# what `load_policy` makes of a model by name
_OF_LOADING = {
    *(option for option in FACTS if option.startswith(("model.", "sample.")) and option != "model.name"),
    *(*FOR_PROMPTS, *FOR_UNETS),
}


def build_policy(config: Config, name: str | None = None) -> Policy:
    """The policy of a configuration, or another model `name` under the same sampler.

    Args:
        name: a whole model, or the folder of a run's adapters, which are loaded beside the configuration's model.
    """
    tuned = None
    if name is not None and Path(name, LORA_WEIGHTS).is_file():
        tuned, name = Path(name), None
    device = choose_device(config.run.device)
    set_up(device, deterministic=config.compute.deterministic)
    base = ""

    def prepare(unet: Any) -> None:
        nonlocal base
        base = digest(unet.state_dict())
        if config.lora.rank:
            add_adapters(unet, **vars(config.lora), seed=config.run.seed)

    model = config.model if name is None else replace(config.model, name=name, revision=None, variant=None)
    preparing = prepare if name is None else None
    policy = load_policy(model, config.sample, config.compute, device=device, prepare=preparing)
    policy.network.base_digest = base
    if tuned is not None:
        load_adapters(policy.network.unet, tuned)
    return policy


def check_policy(policy: Policy, config: Config) -> Policy:
    """A policy of the user's own class, unless options that it was made without say otherwise.

    Raises:
        ValueError: it lacks a part of the protocol; another number of steps, precision, guidance or device than the
            configuration's, adapters, or another option that only a model which is loaded by name follows.
    """
    parts = {*Policy.__annotations__, *(name for name in vars(Policy) if not name.startswith("_"))}
    if lacking := sorted(part for part in parts if not hasattr(policy, part)):
        raise ValueError(f"the policy that was given lacks {', '.join(lacking)}; policies/base.py has the protocol")
    sample, device = config.sample, choose_device(config.run.device)
    set_up(device, deterministic=config.compute.deterministic)
    values = {
        "sample.num_inference_steps": (sample.num_inference_steps, len(policy.sampler)),
        "sample.guidance_scale": (sample.guidance_scale, policy.guidance_scale),
        "compute.precision": (config.compute.precision, policy.precision),
        "lora.rank": (config.lora.rank, 0),
        # one without a number is the current one, which is this
        "run.device": (device, device if policy.device == torch.device(device.type) else policy.device),
    }
    for option, (value, of_policy) in values.items():
        if value != of_policy:
            raise ValueError(f"{option} is {value} but the policy that was given has {of_policy}; make the two equal")
    for option, (neutral, value) in differences(Config(), config).items():
        if option in _OF_LOADING - values.keys():
            raise ValueError(
                f"{option} is {value!r}, which a policy that was given does not follow; leave it at {neutral!r}, and "
                "make the policy so"
            )
    return policy


def build_engine(policy: Policy, config: Config) -> Engine:
    """The plain engine, or DeepSpeed's where engine.deepspeed names its settings.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    optimizer, precision, file = config.optimizer, config.compute.precision, config.engine.deepspeed
    if file is None:
        return PlainEngine(policy.network, optimizer, precision)
    from hrf_fast.engines.zero import DeepSpeedEngine

    # DeepSpeed views weights as flat buffers, where another order is lost or fails; the network's inputs still carry it
    policy.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    engine = DeepSpeedEngine(policy.network, read_settings(file), optimizer, precision)
    policy.attach(engine.forward)
    return engine
