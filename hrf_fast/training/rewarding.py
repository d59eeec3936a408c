"""Scoring: rewards of rolled-out groups, in a thread beside the next rollout, and their advantages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hrf_fast.config.options import Config
from hrf_fast.distributed import comm
from hrf_fast.rewards import CombinedReward, NotFiniteError
from hrf_fast.training.advantages import group_advantages
from hrf_fast.training.metrics import Scores


@dataclass(frozen=True)
class GroupScore:
    """A group's rewards, or why it has none."""

    rewards: Tensor | None
    """[group_size] on the CPU."""
    terms: dict[str, float]
    """Mean of each reward term."""
    problem: str = ""
    """What is not finite."""


class Background:
    """Calls one after the other in a thread of their own; without one, at once. The results are the same."""

    def __init__(self, *, thread: bool, device: torch.device | None = None) -> None:
        """`device`: the thread's current one, if it is a GPU; CUDA starts every thread on the first."""
        start: dict[str, Any] = {}
        if device is not None and device.type == "cuda":
            start = {"initializer": torch.cuda.set_device, "initargs": (device,)}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reward", **start) if thread else None

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """The result to be, or the error that asking for it raises."""
        if self._pool is not None:
            return self._pool.submit(function, *arguments)
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Drop what has not begun: Python would wait for it before it exits."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def score_groups(reward: CombinedReward, images: Mapping[int, Tensor]) -> dict[int, GroupScore]:
    """Score groups' images [B, 3, H, W] as one batch; if that is not finite, each group by itself."""
    try:
        values, terms = _score(reward, torch.cat(list(images.values())))
        parts = values.split(len(values) // len(images))
        return {group: GroupScore(part, terms) for group, part in zip(images, parts, strict=True)}
    except NotFiniteError as error:
        whole = str(error)
    scores = {}
    for group, own in images.items():
        try:
            scores[group] = GroupScore(*_score(reward, own))
        except NotFiniteError as error:
            scores[group] = GroupScore(None, {}, str(error))
    if all(score.rewards is not None for score in scores.values()):
        # finite at the second time of asking, which is no better
        return dict.fromkeys(images, GroupScore(None, {}, whole))
    return scores


def _score(reward: CombinedReward, images: Tensor) -> tuple[Tensor, dict[str, float]]:
    rewards = reward(images)
    return rewards.total.cpu(), {name: float(value) for name, value in rewards.terms.items()}


def gather_scores(
    config: Config,
    own: Iterable[Future[dict[int, GroupScore]]],
    *,
    device: torch.device,
    iteration: int,
    note: Callable[[str], None],
) -> Scores:
    """Wait for the scores of every rank, and standardise the rewards against their peers.

    Args:
        own: of this rank's groups; device: of the advantages.

    Raises:
        RewardError: a reward failed on some rank, or is not finite and train.on_nan is stop.
    """
    train = config.train
    with comm.agreed():
        found = {group: score for future in own for group, score in future.result().items()}
        for group, score in found.items():
            if score.rewards is None and train.on_nan == "stop":
                raise NotFiniteError(f"iteration {iteration}, group {group}: {score.problem}")
    everybody = {group: score for part in comm.gather(found) for group, score in part.items()}
    rewards: dict[int, Tensor] = {}
    for group in sorted(everybody):
        values = everybody[group].rewards
        if values is None:
            note(f"iteration {iteration}, group {group}: its optimizer step is skipped: {everybody[group].problem}")
        else:
            rewards[group] = values
    advantages: dict[int, Tensor | None] = dict.fromkeys(sorted(everybody))
    if rewards:
        peers = torch.arange(len(rewards)).repeat_interleave(train.group_size)
        if train.advantages == "batch":
            peers = torch.zeros_like(peers)
        values = group_advantages(torch.cat(list(rewards.values())), peers, floor=train.advantage_floor)
        advantages |= dict(zip(rewards, values.to(device).split(train.group_size), strict=True))
    lost = torch.full((train.group_size,), torch.nan)
    return Scores(
        {group: rewards.get(group, lost) for group in advantages},
        advantages,
        {group: everybody[group].terms for group in rewards},
    )
