"""Parts: what a configuration builds before anything runs, so that whatever can't work is refused first."""

from __future__ import annotations

from typing import Any

import torch

from hrf_fast.config.options import Config
from hrf_fast.config.zero_settings import read_settings
from hrf_fast.devices import choose_device, set_precision_flags
from hrf_fast.distributed import comm
from hrf_fast.engines.base import Engine
from hrf_fast.engines.plain import PlainEngine
from hrf_fast.evaluation.panel import choose_network
from hrf_fast.memory.activations import choose_activations, memory_for
from hrf_fast.policies.compilation import check_compile
from hrf_fast.policies.load import load_policy
from hrf_fast.policies.pixel import Policy
from hrf_fast.rewards import CombinedReward, RewardTerm, build_reward
from hrf_fast.training.components import Parts
from hrf_fast.training.rewarding import Background
from hrf_fast.windows.schedules import build_schedule


def build_parts(config: Config) -> Parts:
    """Load the model, the reward and its networks, the schedule, the optimizer and the panel's scorer.

    Raises:
        ValueError, ImportError, OSError: names the option, its value and the way out.
    """
    with comm.agreed():
        device = choose_device(config.run.device)
        check_compile(config.train.compile, device)
        policy = build_policy(config)
        reward = build_config_reward(config, device)
        schedule = build_schedule(
            config.window.schedule,
            config.window.kwargs,
            num_inference_steps=config.sample.num_inference_steps,
            stop=policy.diffusion.stochastic_steps,
        )
        scorer = choose_network(config.evaluation.scorer, config.model.name, device)
        auto = config.train.activations == "auto"
        memory = memory_for(config, policy) if auto else 0
    # the rank with the least memory decides for all
    memory = min(comm.gather(memory))
    with comm.agreed():
        activations = choose_activations(config, policy, memory)
    if activations.checkpoint:
        policy.checkpoint_activations()
    # what auto has measured is the UNet as it is
    policy.compile(config.train.compile)
    background = Background(thread=config.reward.background, device=policy.device)
    return Parts(policy, reward, schedule, build_engine(policy, config), scorer, config, activations, background)


def build_engine(policy: Policy, config: Config) -> Engine:
    """The plain engine, or DeepSpeed's where engine.deepspeed names its settings.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    train, file = config.train, config.engine.deepspeed
    options: dict[str, Any] = {
        "weight_decay": train.weight_decay,
        "betas": (train.adam_betas[0], train.adam_betas[1]),
        "eps": train.adam_eps,
        "max_grad_norm": train.max_grad_norm,
        "ema_decay": train.ema_decay,
        "precision": train.precision,
        "optimizer": train.optimizer,
    }
    if file is None:
        return PlainEngine(policy.unet, **options)
    from hrf_fast.engines.zero import DeepSpeedEngine

    # DeepSpeed views weights as flat buffers, where another order is lost or fails; the UNet's inputs still carry it
    policy.unet.to(memory_format=torch.contiguous_format)
    engine = DeepSpeedEngine(policy.unet, policy.network, read_settings(file), **options)
    policy.attach(engine.forward)
    return engine


def build_policy(config: Config, name: str | None = None) -> Policy:
    """The policy of a configuration, or another model `name` under the same sampler."""
    device = choose_device(config.run.device)
    if device.type == "cuda":
        # events and synchronize() are the current device's, and so is what a user's reward calls "cuda"
        torch.cuda.set_device(device)
    set_precision_flags(device, tf32=config.train.tf32, cudnn_benchmark=config.train.cudnn_benchmark)
    return load_policy(
        name or config.model.name,
        revision=config.model.revision if name is None else None,
        sampler=config.sample.scheduler,
        num_inference_steps=config.sample.num_inference_steps,
        eta=config.sample.eta,
        precision=config.train.precision,
        kernels=config.train.kernels,
        attention=config.model.attention,
        channels_last=config.train.channels_last,
        device=device,
    )


def build_config_reward(config: Config, device: torch.device) -> CombinedReward:
    """The reward that a configuration names, or the weighted sum of its terms."""
    reward = config.reward
    return build_reward(reward.terms or [RewardTerm(name=reward.name or "", kwargs=reward.kwargs)], device)
