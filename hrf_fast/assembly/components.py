"""Components of a run, all of them made before anything runs, so that what can't work is refused first."""

from __future__ import annotations

from dataclasses import replace

from hrf_fast.assembly.algorithm import build_algorithm, build_call_plan, build_config_advantages, build_groups
from hrf_fast.assembly.inputs import (
    build_config_reward,
    build_panel,
    build_prompts,
    check_held_out,
    check_reward,
    guidance_note,
    negatives_note,
    prompt_sources,
)
from hrf_fast.assembly.model import build_engine, build_policy, check_policy
from hrf_fast.config.advantage_rules import matching_note
from hrf_fast.config.load import checked
from hrf_fast.config.named import Named, with_names
from hrf_fast.config.options import Config
from hrf_fast.config.rules import check_config, check_job
from hrf_fast.config.stop_rules import spans_note
from hrf_fast.cpu import emulation_note
from hrf_fast.devices import choose_device
from hrf_fast.distributed import comm
from hrf_fast.evaluation.panel import no_network_note
from hrf_fast.memory.activations import choose_activations, memory_for
from hrf_fast.policies.base import Policy
from hrf_fast.policies.compilation import check_compile
from hrf_fast.prompts.draw import draw_distinct
from hrf_fast.prompts.sources import check_prompts
from hrf_fast.rewards import build_reward
from hrf_fast.run.sources import BASE, POLICY, made_source, policy_source
from hrf_fast.stopping import check_floors
from hrf_fast.timing.tuning import set_threads, tuned
from hrf_fast.training.anchors import Anchors, check_anchors
from hrf_fast.training.components import Components
from hrf_fast.training.gradient_noise import NoiseScale
from hrf_fast.training.rewarding import Rewarder
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
    config = with_names(checked(config), reward, schedule)
    own_policy = policy
    sources: dict[str, dict[str, str] | None] = {}
    with comm.agreed():
        # a configuration may have been changed since it was loaded
        check_config(config)
        check_job(config, comm.world_size())
        if not callable(reward):
            check_reward(config)
        check_held_out(config)
        if policy is not None and config.compute.auto_tune:
            raise ValueError(
                "compute.auto_tune is true, which tries calls of the model that model.name loads, but a policy was "
                "given; leave it out, and set what it chooses: compute.threads, and how you made the policy"
            )
        config, tuning = tuned(config, build_policy)
        set_threads(config)
        device = choose_device(config.run.device)
        check_compile(config.compute.compile, device)
        policy = build_policy(config) if policy is None else check_policy(policy, config)
    # of a policy of the user's, each rank may have made its own; a reference is a copy of it
    comm.take_main([*policy.network.parameters(), *policy.network.buffers()])
    with comm.agreed():
        if config.remedies.needs_reference:
            policy.hold_reference()
        check_prompts(
            policy.takes_prompts,
            config.model.name,
            {"prompts.source": config.prompts.source, "evaluation.prompts": config.evaluation.prompts},
            negative=config.prompts.negative,
            negatable=policy.has_unconditional_branch,
        )
        combined = (
            build_reward(reward, device, config.reward.kwargs)
            if callable(reward)
            else build_config_reward(config, device)
        )
        scheduled = schedule if callable(schedule) else config.window.schedule
        windows = build_schedule(
            scheduled,
            config.window.kwargs,
            num_inference_steps=config.sample.num_inference_steps,
            stop=policy.sampler.stochastic_steps,
        )
        check_anchors(windows, config.window.anchor_steps, config.window.anchor_reuse)
        advantages = build_config_advantages(config)
        prompts, prompts_source = build_prompts(config)
        if config.prompts.distinct:
            prompts = draw_distinct(prompts, config.prompts.source, config.train.groups_per_iteration)
        sources = {
            **combined.sources,
            f"schedule {config.window.schedule}": made_source(windows, scheduled, "window.schedule"),
            f"advantages {config.train.advantages}": made_source(
                advantages, config.train.advantages, "train.advantages"
            ),
        }
        # a policy of the user's may have a network of the user's
        if base := getattr(policy.network, "base_digest", ""):
            sources[BASE] = {"file": config.model.name, "sha256": base}
        if own_policy is not None:
            sources[POLICY] = policy_source(own_policy)
        panel = build_panel(config, device, prompts, network)
        sources |= prompt_sources(config, prompts_source, panel) | panel.held_out_sources
        if panel.deterministic_steps:
            # a number of steps that the model's scheduler can't space is refused here, and not at the first panel
            policy.deterministic_sampler(panel.deterministic_steps)
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
    no_network = "" if panel.network else no_network_note(config.evaluation.network, config.model.name)
    guidance = guidance_note(config.model.name, policy)
    negatives = negatives_note(config.model.name, policy, prompts, panel)
    named = (guidance, negatives, panel.note, spans_note(config), matching_note(config))
    notes = (tuning, activations.reason, emulation, no_network, *named)
    return config, Components(
        policy=policy,
        engine=build_engine(policy, config),
        reward=combined,
        rewarder=Rewarder(combined, device, panel.network if config.remedies.novelty else None),
        schedule=windows,
        advantages=advantages,
        groups=build_groups(config),
        call_plan=replace(build_call_plan(config), kept_pairs=activations.kept_pairs),
        algorithm=build_algorithm(config, policy.sampler),
        noise_scale=NoiseScale(config.train.groups_per_step, config.train.step_weights),
        panel=panel,
        term_weights=combined.weights if config.reward.mix == "advantages" else None,
        anchors=Anchors(config.window.anchor_steps, config.window.anchor_reuse),
        prompts=prompts,
        notes=tuple(note for note in notes if note),
        sources={name: source for name, source in sources.items() if source is not None},
    )
