"""Rewarding: rewards of rolled-out groups, in a thread beside the next rollout, and their advantages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hrf_fast.distributed import comm
from hrf_fast.rewards import CombinedReward, NotFiniteError
from hrf_fast.training.advantages import group_advantages, weak_spreads


@dataclass(frozen=True)
class GroupRewards:
    """A group's rewards, or why it has none."""

    rewards: Tensor | None
    """[B] fp32 or fp64 on the CPU; None where one is not finite."""
    terms: dict[str, float]
    """Mean of each reward term."""
    problem: str = ""
    """The value that is not finite, in words."""


class Rewarder:
    """Rewards groups one after the other in a thread, so that the next groups can denoise meanwhile."""

    def __init__(self, reward: CombinedReward, device: torch.device) -> None:
        """`device` becomes the thread's current one if it is a GPU: CUDA starts every thread on the first."""
        self.reward = reward
        start: dict[str, Any] = {}
        if device.type == "cuda":
            start = {"initializer": torch.cuda.set_device, "initargs": (device,)}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reward", **start)

    def submit(self, images: Mapping[int, Tensor]) -> Future[dict[int, GroupRewards]]:
        """The rewards to be of groups' images [B, 3, H, W], as one batch, or the error that asking for them raises."""
        return self._pool.submit(reward_groups, self.reward, images)

    def close(self) -> None:
        """Drop what has not begun: Python would wait for it before it exits."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def reward_groups(reward: CombinedReward, images: Mapping[int, Tensor]) -> dict[int, GroupRewards]:
    """Reward groups' images [B, 3, H, W] as one batch; if that is not finite, each group by itself."""
    try:
        together = _reward(reward, torch.cat(list(images.values())))
        assert together.rewards is not None
        parts = together.rewards.split(len(together.rewards) // len(images))
        return {group: GroupRewards(part, together.terms) for group, part in zip(images, parts, strict=True)}
    except NotFiniteError as error:
        problem = str(error)
    rewards = {}
    for group, group_images in images.items():
        try:
            rewards[group] = _reward(reward, group_images)
        except NotFiniteError as error:
            rewards[group] = GroupRewards(None, {}, str(error))
    if all(group.rewards is not None for group in rewards.values()):
        # finite at the second time of asking, which is no better
        return dict.fromkeys(images, GroupRewards(None, {}, problem))
    return rewards


def _reward(reward: CombinedReward, images: Tensor) -> GroupRewards:
    total, terms = reward(images)
    return GroupRewards(total.cpu(), {name: float(value) for name, value in terms.items()})


def gather_rewards(
    pending: Iterable[Future[dict[int, GroupRewards]]], *, iteration: int, skip_not_finite: bool
) -> dict[int, GroupRewards]:
    """Wait for the rewards of this rank's groups, and gather every rank's, by group in ascending order.

    Raises:
        RewardError: a reward failed on some rank, or is not finite and is not to be skipped; on all ranks.
    """
    with comm.agreed():
        rewards = {group: result for future in pending for group, result in future.result().items()}
        for group, result in rewards.items():
            if result.rewards is None and not skip_not_finite:
                raise NotFiniteError(f"iteration {iteration}, group {group}: {result.problem}")
    everybody = {group: result for part in comm.gather(rewards) for group, result in part.items()}
    return {group: everybody[group] for group in sorted(everybody)}


def standardise(
    rewards: Mapping[int, GroupRewards], *, peers: str, floor: float, device: torch.device
) -> dict[int, Tensor]:
    """Advantages [B] on `device`, by group; a group without rewards has none and is no peer of the others.

    Args:
        peers: group or batch, the samples that a reward is compared with; floor: see `group_advantages`.
    """
    finite = _finite(rewards)
    if not finite:
        return {}
    advantages = group_advantages(*_with_peers(finite, peers), floor=floor)
    sizes = [len(values) for values in finite.values()]
    return dict(zip(finite, advantages.to(device).split(sizes), strict=True))


def spread_notes(rewards: Mapping[int, GroupRewards], *, peers: str, floor: float) -> dict[str, str]:
    """Sentences about rewards whose spread is too small to learn from, by kind; arguments as `standardise`."""
    finite = _finite(rewards)
    return weak_spreads(*_with_peers(finite, peers), floor=floor) if finite else {}


def _finite(rewards: Mapping[int, GroupRewards]) -> dict[int, Tensor]:
    return {group: result.rewards for group, result in rewards.items() if result.rewards is not None}


def _with_peers(rewards: Mapping[int, Tensor], peers: str) -> tuple[Tensor, Tensor]:
    """All rewards [B], and [B] int64 that is equal for peers."""
    sizes = torch.tensor([len(values) for values in rewards.values()])
    index = torch.arange(len(rewards)).repeat_interleave(sizes)
    return torch.cat(list(rewards.values())), index if peers == "group" else torch.zeros_like(index)
