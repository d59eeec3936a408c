"""Rules of advantages: which options that make or change them go together."""

from __future__ import annotations

from typing import Any

from hrf_fast.assets import SHIPPED
from hrf_fast.config.options import Config, TrainConfig


def check_advantages(config: Config) -> None:
    """Check what changes of the advantages ask of each other.

    Raises:
        ValueError: names the options, their values and the way out.
    """
    train, remedies = config.train, config.remedies
    if train.group_size == 1 and train.advantages == "group":
        raise ValueError(
            "train.group_size is 1 with train.advantages=group: one sample has no spread to standardise by; use at "
            "least 2, or advantages=batch"
        )
    if train.group_size * train.groups_per_iteration == 1 and train.advantages == "batch":
        raise ValueError(
            "train.group_size is 1 and train.groups_per_iteration is 1 with train.advantages=batch: one sample has no "
            "spread to standardise by; use at least 2 of either"
        )
    if train.advantages == "prompt" and config.prompts.source is None:
        raise ValueError(
            "train.advantages is prompt but prompts.source is null: there are no prompts to keep statistics of; name a "
            "source, or use train.advantages=group or batch"
        )
    if train.advantages == "prompt" and train.prompt_min_count > train.prompt_buffer:
        raise ValueError(
            f"train.prompt_min_count is {train.prompt_min_count}, which a buffer of train.prompt_buffer "
            f"{train.prompt_buffer} never holds; use at most that"
        )
    if train.advantage_scale == "none" and train.advantage_floor != TrainConfig().advantage_floor:
        raise ValueError(
            f"train.advantage_floor is {train.advantage_floor:g} but train.advantage_scale is none, which divides by "
            "nothing; leave one of them out"
        )
    if train.advantage_scale == "batch" and train.advantages in ("batch", "prompt"):
        std = "the peers are the batch already" if train.advantages == "batch" else "statistics have their own spread"
        raise ValueError(
            f"train.advantage_scale is batch but train.advantages is {train.advantages}: {std}; use "
            "train.advantage_scale=std, or train.advantages=group"
        )
    if remedies.novelty and train.group_size == 1:
        raise ValueError(
            "remedies.novelty is true but train.group_size is 1: no sample has a neighbour; use at least 2"
        )
    network = config.evaluation.network
    if remedies.novelty and (network == "none" or (network == "auto" and config.model.name not in SHIPPED)):
        raise ValueError(
            f"remedies.novelty is true but evaluation.network is {network}, so nothing compares images of model.name "
            f"{config.model.name}; name a network, such as openai/clip-vit-base-patch32"
        )
    if train.gae_lambda is not None:
        peers = train.advantages if train.advantages in ("group", "batch") else "group or batch"
        _ask_of_others(
            f"train.gae_lambda is {train.gae_lambda:g}",
            {
                "train.advantages": (train.advantages, peers, "other peers are of final rewards"),
                "train.group_size": (train.group_size, max(2, train.group_size), "steps are compared in a group"),
                "train.advantage_baseline": (train.advantage_baseline, "mean", "the baseline is a state's value"),
                "remedies.reward_band": (remedies.reward_band, 0, "a band is of final rewards"),
                "remedies.novelty": (remedies.novelty, False, "its factor is of whole trajectories"),
                "remedies.matching": (remedies.matching, 0, "whole trajectories are matched"),
            },
        )
    if config.reward.mix == "advantages":
        _check_mix(config)
    if not remedies.matching:
        return
    order = train.order if train.one_step_a_rollout else "on_policy"
    _ask_of_others(
        f"remedies.matching is {remedies.matching:g}",
        {
            "train.advantages": (train.advantages, "group", "trajectories are matched within their group"),
            "train.advantage_scale": (train.advantage_scale, "std", "matching takes standardised rewards"),
            "train.advantage_baseline": (train.advantage_baseline, "mean", "matching has no baseline"),
            "remedies.novelty": (
                remedies.novelty,
                False,
                "matching has advantages of sum zero, which a factor would break",
            ),
            "train.inner_epochs": (train.inner_epochs, 1, "matching is on-policy"),
            "train.order": (train.order, order, "matching is on-policy"),
        },
    )


def matching_note(config: Config) -> str:
    """A line where clips cut the advantages of matching, which go up to the group's size; else empty."""
    train = config.train
    scaled = train.scale_clips_by_window and config.window.schedule != "full"
    # a window of one step
    lowest = train.advantage_clip / (config.sample.num_inference_steps if scaled else 1)
    if not config.remedies.matching or lowest >= train.group_size:
        return ""
    lower = ", which train.scale_clips_by_window lowers further," if scaled else ""
    switch = " train.scale_clips_by_window=false" if scaled else ""
    return (
        f"remedies.matching has advantages of up to {train.group_size}, the group's size, and train.advantage_clip "
        f"{train.advantage_clip:g}{lower} cuts them: the update is not that of matching then; set "
        f"train.advantage_clip={max(train.advantage_clip, train.group_size):g}{switch}"
    )


def _check_mix(config: Config) -> None:
    """Check that each term can be standardised on its own."""
    train = config.train
    if not config.reward.terms:
        raise ValueError(
            "reward.mix is advantages but reward.terms is empty, so there is nothing to mix; use reward.mix=sum, or "
            "terms with reward.name=null"
        )
    peers = train.advantages if train.advantages in ("group", "batch") else "group or batch"
    scale = train.advantage_scale if train.advantage_scale != "none" else "std"
    _ask_of_others(
        "reward.mix is advantages",
        {
            "train.advantages": (train.advantages, peers, "other peers are of one reward"),
            "train.advantage_scale": (train.advantage_scale, scale, "without a scale that is reward.mix=sum"),
            "train.gae_lambda": (train.gae_lambda, None, "the value of a state is one reward"),
            "remedies.matching": (config.remedies.matching, 0, "trajectories are matched to one reward"),
        },
    )


def _ask_of_others(cause: str, needs: dict[str, tuple[Any, Any, str]]) -> None:
    """Refuse values of options that a cause has no use for; `needs` has of each its value, the needed one, and why."""
    for option, (value, needed, why) in needs.items():
        if value != needed:
            way_out = "null" if needed is None else needed
            raise ValueError(f"{option} is {value} but {cause}: {why}; use {way_out}")
