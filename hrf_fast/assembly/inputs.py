"""Inputs of a run besides its model: the prompts, the reward and the panel that it is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from hrf_fast.assembly.algorithm import build_call_plan
from hrf_fast.assets import SHIPPED
from hrf_fast.config.options import Config
from hrf_fast.distributed import comm
from hrf_fast.evaluation.panel import Panel, choose_network
from hrf_fast.policies.base import Policy
from hrf_fast.prompts.draw import PromptList, Prompts
from hrf_fast.prompts.sources import load_prompts
from hrf_fast.rewards import CombinedReward, build_reward, check_names
from hrf_fast.vision.base import FeatureNetwork


def build_prompts(config: Config) -> tuple[Prompts | None, dict[str, str] | None]:
    """The prompts to train on, None without a source, and the user's file or function as `source_of` gives it."""
    section = config.prompts
    return load_prompts("prompts.source", section.source, section.kwargs, negative=section.negative)


def check_reward(config: Config) -> None:
    """Refuse a reward by its name, before any network is loaded.

    Raises:
        ValueError: no such reward or module, or a reward that reads prompts in a run that has none.
    """
    reward = config.reward
    readers = check_names([term.name for term in reward.terms] or [reward.name or ""])
    _refuse_without_prompts(config, readers)


def check_held_out(config: Config) -> None:
    """Refuse a held-out reward by its name, before any network is loaded; errors as `check_reward`."""
    for index, held in enumerate(config.evaluation.rewards):
        _refuse_without_prompts(config, check_names([held.name], f"evaluation.rewards[{index}].name"))


def _refuse_without_prompts(config: Config, readers: Sequence[str]) -> None:
    """Refuse rewards that read prompts in a run that has none."""
    if readers and config.prompts.source is None:
        raise ValueError(
            f"the reward {readers[0]} compares images with their prompts, but prompts.source is null; use another "
            f"reward, or prompts and a text-to-image model (model.name is {config.model.name})"
        )


def build_config_reward(config: Config, device: torch.device) -> CombinedReward:
    """The reward that a configuration names, or the weighted sum of its terms; errors as `check_reward`."""
    check_reward(config)
    reward = config.reward
    return build_reward(reward.terms or reward.name or "", device, None if reward.terms else reward.kwargs)


def build_held_out(config: Config, device: torch.device) -> dict[str, CombinedReward]:
    """The rewards of evaluation.rewards by name; none on other ranks than the main one, which alone rewards panels."""
    check_held_out(config)
    return {
        held.name: build_reward(
            held.name,
            device,
            held.kwargs,
            option_prefix=f"evaluation.rewards[{index}].kwargs.",
            name_option=f"evaluation.rewards[{index}].name",
        )
        for index, held in enumerate(config.evaluation.rewards)
        if comm.is_main()
    }


def build_panel(
    config: Config,
    device: torch.device,
    prompts: Prompts | None = None,
    network: FeatureNetwork | None = None,
) -> Panel:
    """The panel of the evaluation section, with its network or the one given; `prompts` are the training's.

    Raises:
        ValueError: no such network, held-out reward or source of prompts, or a panel that its prompts do not share
            equally.
    """
    network = network or choose_network(config.evaluation.network, config.model.name, device)
    return replace(build_prompted_panel(config, prompts), network=network, held_out=build_held_out(config, device))


def build_prompted_panel(config: Config, prompts: Prompts | None) -> Panel:
    """The panel without its network and held-out rewards; arguments and errors as `build_panel`."""
    evaluation = config.evaluation
    panel = Panel(
        evaluation.panel_size,
        evaluation.seed,
        build_call_plan(config).sampled,
        deterministic_steps=evaluation.deterministic_steps,
    )
    if evaluation.prompts is not None:
        prompts, source = load_prompts("evaluation.prompts", evaluation.prompts, negative=config.prompts.negative)
        panel = replace(panel, source=source)
    return panel if prompts is None else panel.with_prompts(prompts, evaluation.images_per_prompt)


def guidance_note(model: str, policy: Policy) -> str:
    """A line for a text-to-image run without guidance; empty for a shipped model or one distilled to need none.

    Args:
        model: model.name.
    """
    if model in SHIPPED or policy.guidance_scale != 1 or not policy.has_unconditional_branch:
        return ""
    return (
        "sample.guidance_scale is 1: images are drawn and trained without guidance, as distilled (turbo) models want; "
        "others follow prompts loosely so, and are published at 4.5 to 7.5: set sample.guidance_scale=5, for two rows "
        "of the network an image"
    )


def negatives_note(model: str, policy: Policy, prompts: Prompts | None, panel: Panel) -> str:
    """A line where a prompt has a negative prompt of its own that nothing acts on; else empty.

    Args:
        model: model.name; prompts: the training's.
    """
    if policy.has_unconditional_branch and policy.guidance_scale != 1:
        return ""
    listed = [*(prompts.prompts if isinstance(prompts, PromptList) else ()), *panel.prompts]
    if (first := next((prompt for prompt in listed if prompt.negative), None)) is None:
        return ""
    start, way_out = f"model.name {model} has no negative prompts", "leave them out"
    if policy.has_unconditional_branch:
        start, way_out = "sample.guidance_scale is 1", "use a scale above 1, or leave them out"
    return f"{start}: those of single prompts, such as {first.negative!r} of {first.text!r}, have no effect; {way_out}"


def prompt_sources(config: Config, source: dict[str, str] | None, panel: Panel) -> dict[str, dict[str, str] | None]:
    """The user's files or functions of prompts by name, for a run's record; `source` as `build_prompts` gives it."""
    return {f"prompts {config.prompts.source}": source, f"panel's prompts {config.evaluation.prompts}": panel.source}
