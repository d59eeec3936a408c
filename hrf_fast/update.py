"""Update: every window step of every trajectory of the batch, then one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hrf_fast import comm
from hrf_fast.engine import Engine
from hrf_fast.metrics import StepStats
from hrf_fast.policy import Policy
from hrf_fast.trajectory import Trajectory, Window
from hrf_kernels import Surrogate, clipped_surrogate


def update(
    engine: Engine,
    policy: Policy,
    trajectories: Sequence[Trajectory],
    advantages: Sequence[Tensor],
    *,
    clip_range: float,
    advantage_clip: float,
    scale_clips_by_window: bool,
    micro_batch_size: int,
    steps_per_forward: int = 1,
    pairs: int | None = None,
    forwards: int = 0,
) -> StepStats:
    """One optimizer step on a batch of groups (DDPO, arXiv 2305.13301; HRF, arXiv 2410.08315).

    The loss of a group is the sum over its window's steps of the mean over its samples; groups are averaged.

    Args:
        trajectories: this rank's groups, whose windows may differ; advantages: [B] fp32 for each.
        clip_range, advantage_clip: ε of the ratio's range and the bound on |advantage|; with `scale_clips_by_window`
            both are multiplied by (T − start)/T for each group.
        micro_batch_size, steps_per_forward: a forward holds their product, samples times consecutive steps.
        pairs: samples × steps of the groups of all ranks, if there are others.
        forwards: of the rank with the longest windows, where ranks must make equally many (`Engine.lockstep`): those
            that this rank lacks are made with weight 0, and are not counted as calls.

    Returns:
        StepStats: the loss as differentiated, the rest over every sample and step of the batch.
    """
    totals = StepStats.zeros(policy.device)
    pairs = pairs or sum(trajectory.old_log_prob.numel() for trajectory in trajectories)
    with engine.accumulating():
        for trajectory, advantage in zip(trajectories, advantages, strict=True):
            num_steps = len(policy.diffusion)
            scale = (num_steps - trajectory.window.start) / num_steps if scale_clips_by_window else 1.0
            clips = {
                "clip_range": clip_range,
                "advantage_clip": advantage_clip,
                "window_scale": scale,
                "loss_weight": 1 / (trajectory.group_size * len(trajectories)),
            }
            for surrogate in _replay(policy, trajectory, advantage, clips, micro_batch_size, steps_per_forward):
                loss = surrogate.loss.sum()
                engine.backward(loss)
                totals = totals.add(loss.detach() / comm.world_size(), surrogate)
                forwards -= 1
        with policy.uncounted():
            for _ in range(forwards):
                last = trajectories[-1].latents[-2, :micro_batch_size]
                engine.backward(0 * policy.model_output(last, trajectories[-1].timesteps[-1]).sum())
    return totals.finish(pairs, engine.step())


def forwards_of(window: Window, group_size: int, micro_batch_size: int, steps_per_forward: int) -> int:
    """How many forwards a group's update makes."""
    return -(-group_size // micro_batch_size) * -(-len(window) // steps_per_forward)


def _replay(
    policy: Policy,
    trajectory: Trajectory,
    advantage: Tensor,
    clips: dict[str, Any],
    micro_batch_size: int,
    steps_per_forward: int,
) -> Iterator[Surrogate]:
    """Score the window again under the current weights, a chunk of samples and steps at a time.

    Args:
        clips: clip_range and the other numbers that `clipped_surrogate` takes.
    """
    latents, count = trajectory.latents, trajectory.group_size
    for first in range(0, count, micro_batch_size):
        part = slice(first, min(first + micro_batch_size, count))
        size = part.stop - part.start
        for begin in range(0, len(trajectory.window), steps_per_forward):
            steps = slice(begin, min(begin + steps_per_forward, len(trajectory.window)))
            repeats = steps.stop - steps.start
            # the same scalar form as the rollout's, so that the arithmetic and hence the ratio is equal to the bit
            one_step = repeats == 1
            coefficients = (
                trajectory.coefficients[begin] if one_step else trajectory.coefficients[steps].repeat_interleave(size)
            )
            timesteps = trajectory.timesteps[begin] if one_step else trajectory.timesteps[steps].repeat_interleave(size)
            now = latents[steps, part].flatten(0, 1)
            following = latents[steps.start + 1 : steps.stop + 1, part].flatten(0, 1)
            yield clipped_surrogate(
                policy.model_output(now, timesteps),
                now,
                following,
                coefficients,
                trajectory.old_log_prob[steps, part].flatten(),
                advantage[part].repeat(repeats),
                **clips,
                backend=policy.kernels,
            )


@torch.enable_grad()
def replay_ratio_error(
    policy: Policy, trajectory: Trajectory, *, micro_batch_size: int, steps_per_forward: int
) -> float:
    """Largest |ratio − 1| when a fresh trajectory is scored again under unchanged weights: 0 if replay is exact.

    With gradient on, as the update does it: a compiled UNet is another graph then, an attention may be another kernel.
    """
    worst = torch.zeros((), device=policy.device)
    advantage = torch.zeros(trajectory.group_size, device=policy.device)
    for surrogate in _replay(policy, trajectory, advantage, {"clip_range": 1.0}, micro_batch_size, steps_per_forward):
        worst = torch.maximum(worst, (surrogate.ratio.detach() - 1).abs().max())
    return float(worst)
