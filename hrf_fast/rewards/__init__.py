"""Rewards: what an image is worth, as a callable `reward(images, prompts) -> [B]`, higher is better.

`build_reward` turns the terms of a config, or a function, into one checked callable that returns `Rewards`;
`list_rewards` lists the registered ones. A new reward is a factory under `@register_reward("name")`, or any function,
in a config as `module:function`. A family loads when it is listed or built, weights and transformers when built.
"""

from hrf_fast.config.options import RewardTerm
from hrf_fast.rewards.build import CombinedReward, build_reward, check_images, check_names, check_rewards
from hrf_fast.rewards.registry import (
    NotFiniteError,
    Reward,
    RewardError,
    RewardInfo,
    Rewards,
    list_rewards,
    register_reward,
)

__all__ = [
    "CombinedReward",
    "NotFiniteError",
    "Reward",
    "RewardError",
    "RewardInfo",
    "RewardTerm",
    "Rewards",
    "build_reward",
    "check_images",
    "check_names",
    "check_rewards",
    "list_rewards",
    "register_reward",
]
