"""Rewarding: rewards of rolled-out groups, in a thread beside the next rollout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hrf_fast.distributed import comm
from hrf_fast.prompts import Prompt
from hrf_fast.rewards import CombinedReward, NotFiniteError
from hrf_fast.training.remedies import novelty
from hrf_fast.training.worker import Worker
from hrf_fast.vision.base import FeatureNetwork


@dataclass(frozen=True)
class GroupRewards:
    """A group's rewards, or why it has none."""

    rewards: Tensor | None
    """[B] fp32 or fp64 on the CPU; None where one is not finite."""
    terms: dict[str, float]
    """Mean of each reward term."""
    problem: str = ""
    """The value that is not finite, in words."""
    prompt: str = ""
    """The group's prompt; empty for a model that takes none."""
    by_term: dict[str, Tensor] = field(default_factory=dict)
    """[B] of each reward term before its weight, on the CPU."""
    novelty: Tensor | None = None
    """[B] of `remedies.novelty`, where that is asked for."""
    log_prob: Tensor | None = None
    """[B] of each trajectory in its window, where trajectories are matched."""
    values: Tensor | None = None
    """[S, B] on the CPU: rewards of the clean images that were predicted at the window's steps, where steps have credit
    of their own."""
    after: Tensor | None = None
    """[B] on the CPU: the reward of those that were predicted at the window's end, where noise follows it."""


class Rewarder:
    """Rewards groups one after the other in a thread, so that the next groups can denoise meanwhile."""

    def __init__(self, reward: CombinedReward, device: torch.device, network: FeatureNetwork | None = None) -> None:
        """Start the thread.

        Args:
            device: becomes the thread's current one if it is a GPU: CUDA starts every thread on the first.
            network: tells how novel each image is in its group; None to leave that out.
        """
        self.reward, self._network = reward, network
        self._pool = Worker("reward")
        if device.type == "cuda":
            self._pool.submit(torch.cuda.set_device, device).result()
        elif device.type == "cpu":
            threads = torch.get_num_threads()
            self._pool.submit(_compute_alone).result()
            # it was set for threads to come too
            torch.set_num_threads(threads)

    def submit(
        self,
        images: Mapping[int, Tensor],
        prompts: Mapping[int, Prompt | None] | None = None,
        log_probs: Mapping[int, Tensor] | None = None,
        estimates: Mapping[int, Tensor] | None = None,
        after: Mapping[int, Tensor] | None = None,
    ) -> Future[dict[int, GroupRewards]]:
        """The rewards to be of groups' images [B, 3, H, W], as one batch, or the error that asking for them raises.

        Args:
            log_probs: [B] of each group's trajectories, to go with its rewards; None for none.
            estimates: [S, B, 3, H, W] of each group, to be rewarded too; empty or None for none.
            after: [B, 3, H, W] of groups whose windows noise follows, to be rewarded beside the estimates.
        """
        return self._pool.submit(self._reward, images, prompts, log_probs, estimates or {}, after or {})

    def _reward(
        self,
        images: Mapping[int, Tensor],
        prompts: Mapping[int, Prompt | None] | None,
        log_probs: Mapping[int, Tensor] | None,
        estimates: Mapping[int, Tensor],
        after: Mapping[int, Tensor],
    ) -> dict[int, GroupRewards]:
        rewards = reward_groups(self.reward, images, prompts)
        for group, predicted in estimates.items():
            if rewards[group].rewards is not None:
                states = predicted if group not in after else torch.cat([predicted, after[group][None]])
                prompt = (prompts or {}).get(group)
                rewards[group] = _with_values(self.reward, rewards[group], states, len(predicted), prompt)
        for group in rewards:
            if log_probs is not None:
                rewards[group] = replace(rewards[group], log_prob=log_probs[group].cpu())
            if self._network is not None:
                rewards[group] = replace(rewards[group], novelty=novelty(self._network.features(images[group]).cpu()))
        return rewards

    @property
    def closed(self) -> bool:
        """Whether it rewards nothing any more."""
        return self._pool.closed

    def close(self) -> None:
        """Drop what has not begun; what runs is not waited for."""
        self._pool.close()


def _compute_alone() -> None:
    """Keep this thread's torch operations to itself.

    OpenMP gives each thread that computes in parallel workers of its own. As soon as these are more than the
    processors, none of them waits actively for work any more, and waking them made the iterations of a small network
    1.3 times as long.
    """
    # before it is asked for, the number is not this thread's own
    torch.get_num_threads()
    torch.set_num_threads(1)


def reward_groups(
    reward: CombinedReward, images: Mapping[int, Tensor], prompts: Mapping[int, Prompt | None] | None = None
) -> dict[int, GroupRewards]:
    """Reward groups' images [B, 3, H, W] as one batch; if that is not finite, each group by itself.

    Args:
        prompts: by group; None for a model that takes none.
    """
    by_group = prompts or dict.fromkeys(images)
    texts = {group: prompt.text if prompt else "" for group, prompt in by_group.items()}
    try:
        together = _reward(reward, images, by_group)
        assert together.rewards is not None
        size = len(together.rewards) // len(images)
        parts = {group: slice(index * size, (index + 1) * size) for index, group in enumerate(images)}
        return {
            group: GroupRewards(
                together.rewards[part],
                together.terms,
                prompt=texts[group],
                by_term={term: values[part] for term, values in together.by_term.items()},
            )
            for group, part in parts.items()
        }
    except NotFiniteError as error:
        problem = str(error)
    rewards = {}
    for group, group_images in images.items():
        try:
            rewards[group] = replace(_reward(reward, {group: group_images}, by_group), prompt=texts[group])
        except NotFiniteError as error:
            rewards[group] = GroupRewards(None, {}, str(error), texts[group])
    if all(group.rewards is not None for group in rewards.values()):
        # finite at the second time of asking, which is no better
        return {group: GroupRewards(None, {}, problem, texts[group]) for group in images}
    return rewards


def _reward(reward: CombinedReward, images: Mapping[int, Tensor], prompts: Mapping[int, Prompt | None]) -> GroupRewards:
    asked = [prompts[group] for group, group_images in images.items() for _ in group_images]
    total, by_term = reward(torch.cat(list(images.values())), asked)
    return GroupRewards(
        total.cpu(),
        {term: float(values.mean()) for term, values in by_term.items()},
        by_term={term: values.cpu() for term, values in by_term.items()},
    )


def _with_values(
    reward: CombinedReward, result: GroupRewards, states: Tensor, window_steps: int, prompt: Prompt | None
) -> GroupRewards:
    """The group's rewards with its values, or why it has neither.

    Args:
        states: [S or S + 1, B, 3, H, W], the clean images that were predicted at the S = `window_steps` and after them.
    """
    try:
        total, _ = reward(states.flatten(0, 1), [prompt] * states.shape[:2].numel())
    except NotFiniteError as error:
        return GroupRewards(None, {}, f"{error} (of predicted clean images, for train.gae_lambda)", result.prompt)
    values = total.cpu().view(states.shape[:2])
    after = values[-1] if len(values) > window_steps else None
    return replace(result, values=values[:window_steps], after=after)


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
