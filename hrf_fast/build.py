"""Build: make a run's components from its configuration before anything runs, so that what can't work is refused first.

The only module that opens the whole configuration for the loop: what is below it takes values.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hrf_fast.config.named import Named, with_names
from hrf_fast.config.options import Config
from hrf_fast.config.rules import check_job
from hrf_fast.config.zero_settings import read_settings
from hrf_fast.cpu import emulation_note
from hrf_fast.devices import choose_device, set_precision_flags
from hrf_fast.distributed import comm
from hrf_fast.engines.base import Engine
from hrf_fast.engines.optimizers import learning_rate_at
from hrf_fast.engines.plain import PlainEngine
from hrf_fast.evaluation.panel import Panel, choose_network, no_network_note
from hrf_fast.memory.activations import choose_activations, memory_for
from hrf_fast.memory.tuning import set_threads, tuned
from hrf_fast.policies.base import Policy
from hrf_fast.policies.compilation import check_compile
from hrf_fast.policies.load import load_policy
from hrf_fast.policies.lora import LORA_WEIGHTS, add_adapters, load_adapters
from hrf_fast.policies.option_checks import check_given
from hrf_fast.policies.sampler import Sampler
from hrf_fast.prompts.draw import Prompts
from hrf_fast.prompts.sources import check_prompts, load_prompts
from hrf_fast.rewards import CombinedReward, RewardTerm, build_reward
from hrf_fast.stopping import check_floors
from hrf_fast.training.anchors import Anchors, check_anchors
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.components import Components, Rules
from hrf_fast.training.gradient_noise import NoiseScale
from hrf_fast.training.groups import Groups
from hrf_fast.training.optimizer_step import Clips
from hrf_fast.training.peers import Advantages, build_advantages
from hrf_fast.training.reference import reference_at
from hrf_fast.training.rewarding import Rewarder
from hrf_fast.training.step_weights import step_weights
from hrf_fast.training.thinning import Thinning
from hrf_fast.user_code import source_of
from hrf_fast.vision.base import FeatureNetwork
from hrf_fast.windows.schedules import build_schedule


def build_components(
    config: Config,
    *,
    reward: Named = None,
    schedule: Named = None,
    policy: Policy | None = None,
    network: FeatureNetwork | None = None,
) -> tuple[Config, Components]:
    """Load the model, the reward and its networks, the schedule, the optimizer and the panel's network.

    Args:
        reward, schedule: a name or a callable instead of the configuration's; see `hrf_fast.train`.
        policy: a pretrained model of your own class, which model.name only labels; network: what panels and
            remedies.novelty compare images by, which evaluation.network only labels.

    Returns:
        The configuration with those names in it, and the components.

    Raises:
        ValueError, ImportError, OSError: names the option, its value and the way out; on all ranks.
    """
    config = with_names(config, reward, schedule)
    sources: dict[str, dict[str, str] | None] = {}
    with comm.agreed():
        check_job(config, comm.world_size())
        config, tuning = tuned(config, build_policy)
        set_threads(config)
        device = choose_device(config.run.device)
        check_compile(config.compute.compile, device)
        policy = build_policy(config) if policy is None else _given(policy, config)
        if config.remedies.needs_reference:
            policy.hold_reference()
        combined = (
            build_reward(reward, device, config.reward.kwargs)
            if callable(reward)
            else build_config_reward(config, device)
        )
        windows = build_schedule(
            schedule if callable(schedule) else config.window.schedule,
            config.window.kwargs,
            num_inference_steps=config.sample.num_inference_steps,
            stop=policy.sampler.stochastic_steps,
        )
        check_anchors(windows, config.window.anchor_steps, config.window.anchor_reuse)
        advantages = build_config_advantages(config)
        prompts, prompts_source = build_prompts(config)
        check_prompts(
            policy.takes_prompts,
            config.model.name,
            {"prompts.source": config.prompts.source, "evaluation.prompts": config.evaluation.prompts},
            combined.prompt_readers,
        )
        sources = {**combined.sources, f"schedule {config.window.schedule}": source_of(windows)}
        sources[f"prompts {config.prompts.source}"] = prompts_source
        sources[f"advantages {config.train.advantages}"] = source_of(advantages)
        panel = build_panel(config, device, prompts, network)
        check_floors(config.stop, panel.shares)
        memory = memory_for(config, policy) if config.compute.activations == "auto" else 0
    # a source of the user's may answer otherwise on every rank
    panel = replace(panel, prompts=comm.broadcast(panel.prompts))
    # the rank with the least memory decides for all
    memory = min(comm.gather(memory))
    with comm.agreed():
        activations = choose_activations(config, policy, memory, schedule)
    if activations.checkpoint:
        policy.network.checkpoint_activations()
    # what auto has measured is the network as it is
    policy.compile(config.compute.compile)
    emulation = emulation_note(config.compute.precision, device.type)
    no_network = no_network_note(config.evaluation.network, config.model.name)
    notes = (tuning, activations.reason, emulation, no_network, panel.note)
    return config, Components(
        policy=policy,
        engine=build_engine(policy, config),
        reward=combined,
        rewarder=Rewarder(combined, device, panel.network if config.remedies.novelty else None),
        schedule=windows,
        advantages=advantages,
        groups=build_groups(config),
        calls=replace(build_call_plan(config), kept_pairs=activations.kept_pairs),
        rules=build_rules(config, policy.sampler),
        panel=panel,
        anchors=Anchors(config.window.anchor_steps, config.window.anchor_reuse),
        prompts=prompts,
        notes=tuple(note for note in notes if note),
        sources={name: source for name, source in sources.items() if source is not None},
    )


def build_groups(config: Config) -> Groups:
    """The groups of an iteration, and this rank's share."""
    train = config.train
    return Groups(train.groups_per_iteration, train.group_size, train.groups_per_step, comm.rank(), comm.world_size())


def build_call_plan(config: Config) -> CallPlan:
    """How samples are put into network calls, before any graph is kept."""
    train = config.train
    return CallPlan(train.group_size, config.compute.images_per_call, train.order, halves=train.gradient_noise)


def build_rules(config: Config, sampler: Sampler) -> Rules:
    """The numbers of the algorithm."""
    train, optimizer = config.train, config.optimizer
    return Rules(
        seed=config.run.seed,
        clips=Clips(
            train.clip_range,
            train.advantage_clip,
            train.scale_clips_by_window,
            step_weights(train.step_weights, sampler),
        ),
        noise_scale=NoiseScale(train.groups_per_step, train.step_weights),
        inner_epochs=train.inner_epochs,
        skip_not_finite=config.stop.on_nan == "skip",
        max_drift=config.stop.max_drift,
        learning_rate=learning_rate_at(
            optimizer.learning_rate_schedule,
            peak=optimizer.learning_rate,
            burn_in_iterations=optimizer.burn_in_iterations,
            warmup_iterations=optimizer.warmup_iterations,
            iterations=train.iterations,
        ),
        guided=train.guidance,
        shared_noise=config.window.shared_noise,
        gae_lambda=train.gae_lambda,
        sharpness=config.remedies.matching,
        thinning=Thinning(train.step_share, train.skip_flat_groups),
        reference=reference_at(
            config.remedies, num_inference_steps=config.sample.num_inference_steps, iterations=train.iterations
        ),
    )


def build_config_advantages(config: Config) -> Advantages:
    """Build what train.advantages names."""
    names = ("advantage_floor", "advantage_scale", "advantage_baseline", "prompt_buffer", "prompt_min_count")
    options = {name: getattr(config.train, name) for name in names}
    return build_advantages(config.train.advantages, reward_band=config.remedies.reward_band, **options)


def build_prompts(config: Config) -> tuple[Prompts | None, dict[str, str] | None]:
    """The prompts to train on, None without a source, and the user's file or function as `source_of` gives it."""
    section = config.prompts
    return load_prompts("prompts.source", section.source, section.kwargs, negative=section.negative)


def build_panel(
    config: Config,
    device: torch.device,
    prompts: Prompts | None = None,
    network: FeatureNetwork | None = None,
) -> Panel:
    """The panel of the evaluation section, with its network or the one given; `prompts` are the training's.

    Raises:
        ValueError: no such network or source of prompts, or a panel that its prompts do not share equally.
    """
    network = network or choose_network(config.evaluation.network, config.model.name, device)
    return replace(build_prompted_panel(config, prompts), network=network)


def build_prompted_panel(config: Config, prompts: Prompts | None) -> Panel:
    """The panel without its network; arguments and errors as `build_panel`."""
    evaluation = config.evaluation
    panel = Panel(evaluation.panel_size, evaluation.seed, build_call_plan(config).sampled)
    if evaluation.prompts is not None:
        prompts, _ = load_prompts("evaluation.prompts", evaluation.prompts, negative=config.prompts.negative)
    return panel if prompts is None else panel.with_prompts(prompts, evaluation.images_per_prompt)


def build_engine(policy: Policy, config: Config) -> Engine:
    """The plain engine, or DeepSpeed's where engine.deepspeed names its settings.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    optimizer, file = config.optimizer, config.engine.deepspeed
    options: dict[str, Any] = {
        "optimizer": optimizer.name,
        "weight_decay": optimizer.weight_decay,
        "betas": optimizer.betas,
        "eps": optimizer.eps,
        "max_grad_norm": optimizer.max_grad_norm,
        "ema_decay": optimizer.ema_decay,
        "precision": config.compute.precision,
    }
    if file is None:
        return PlainEngine(policy.network, **options)
    from hrf_fast.engines.zero import DeepSpeedEngine

    # DeepSpeed views weights as flat buffers, where another order is lost or fails; the network's inputs still carry it
    policy.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    engine = DeepSpeedEngine(policy.network, read_settings(file), **options)
    policy.attach(engine.forward)
    return engine


def _given(policy: Policy, config: Config) -> Policy:
    sample, rank = config.sample, config.lora.rank
    return check_given(policy, sample.num_inference_steps, sample.guidance_scale, config.compute.precision, rank)


def build_policy(config: Config, name: str | None = None) -> Policy:
    """The policy of a configuration, or another model `name` under the same sampler.

    Args:
        name: a whole model, or the folder of a run's adapters, which are loaded beside the configuration's model.
    """
    tuned = None
    if name is not None and Path(name, LORA_WEIGHTS).is_file():
        tuned, name = Path(name), None
    compute, sample = config.compute, config.sample
    device = choose_device(config.run.device)
    if device.type == "cuda":
        # events and synchronize() are the current device's, and so is what a user's reward calls "cuda"
        torch.cuda.set_device(device)
    set_precision_flags(device, deterministic=compute.deterministic)
    policy = load_policy(
        name or config.model.name,
        revision=config.model.revision if name is None else None,
        variant=config.model.variant if name is None else None,
        decoder=config.model.decoder,
        image_size=config.model.image_size,
        sampler=sample.scheduler,
        num_inference_steps=sample.num_inference_steps,
        eta=sample.eta,
        noise_level=sample.noise_level,
        guidance_scale=sample.guidance_scale,
        precision=compute.precision,
        attention=compute.attention,
        channels_last=compute.channels_last,
        offload=compute.offload,
        device=device,
    )
    if config.lora.rank and name is None:
        add_adapters(policy.network.unet, **vars(config.lora), seed=config.run.seed)
    if tuned is not None:
        load_adapters(policy.network.unet, tuned)
    return policy


def build_config_reward(config: Config, device: torch.device) -> CombinedReward:
    """The reward that a configuration names, or the weighted sum of its terms."""
    reward = config.reward
    return build_reward(reward.terms or [RewardTerm(name=reward.name or "", kwargs=reward.kwargs)], device)
