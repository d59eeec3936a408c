"""Update: every window step of every trajectory of the batch, then one optimizer step.

A step's model output comes from the rollout, which has kept its graph, or from a replay under the current weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hrf_fast.distributed import comm
from hrf_fast.engines.base import Engine
from hrf_fast.policies.pixel import Policy
from hrf_fast.training.calls import Call, Piece
from hrf_fast.training.metrics import StepStats
from hrf_fast.training.trajectory import Trajectory
from hrf_kernels import Surrogate, clipped_surrogate


@dataclass(frozen=True)
class Clips:
    """The bounds of DDPO's loss, and how HRF scales them."""

    clip_range: float
    """ε of the ratio's range."""
    advantage_clip: float
    """Bound on |advantage|."""
    scale_by_window: bool
    """Multiply both by (T − start)/T of each group."""


def update(
    engine: Engine,
    policy: Policy,
    trajectories: Mapping[int, Trajectory],
    advantages: Mapping[int, Tensor],
    calls: Iterable[Call],
    clips: Clips,
    *,
    pairs: int | None = None,
    forwards: int = 0,
) -> StepStats:
    """One optimizer step on a batch of groups (DDPO, arXiv 2305.13301; HRF, arXiv 2410.08315).

    The loss of a group is the sum over its window's steps of the mean over its samples; groups are averaged.

    Args:
        trajectories: this rank's groups, whose windows may differ; advantages: [B] fp32 for each.
        calls: which steps and samples share a UNet call; together every step of every window once. Those that come
            with their output are not made again.
        pairs: samples × steps of the groups of all ranks, if there are others.
        forwards: of the rank that replays most, where ranks must make equally many (`Engine.lockstep`): those that this
            rank lacks are made with weight 0, and are not counted as calls.

    Returns:
        StepStats: the loss as differentiated, the rest over every sample and step of the batch.
    """
    totals = StepStats.zeros(policy.device)
    pairs = pairs or sum(trajectory.old_log_prob.numel() for trajectory in trajectories.values())
    some = next(iter(trajectories.values()))
    weight = 1 / (some.group_size * len(trajectories))
    kept: list[Tensor] = []
    with engine.accumulating():
        for call in calls:
            replayed = call.output is None
            surrogate = _score(policy, trajectories, advantages, call, clips, loss_weight=weight)
            loss = surrogate.loss.sum()
            totals = totals.add(loss.detach() / comm.world_size(), surrogate)
            policy.calls.backwards += call.images
            forwards -= replayed
            if engine.lockstep and not replayed:
                # ranks keep different numbers of graphs: one backward is as many on all
                kept.append(loss)
                continue
            with policy.stopwatch.running():
                engine.backward(loss)
        if kept:
            with policy.stopwatch.running():
                engine.backward(torch.stack(kept).sum())
        for _ in range(forwards):
            # past the policy, which would count and time it
            engine.backward(0 * policy.trained(some.latents[-2, :2], some.timesteps[-1]).sum())
    return totals.finish(pairs, engine.step())


def _score(
    policy: Policy,
    trajectories: Mapping[int, Trajectory],
    advantages: Mapping[int, Tensor],
    call: Call,
    clips: Clips,
    *,
    loss_weight: float = 1.0,
) -> Surrogate:
    """The clipped loss of a call's samples and steps, step by step within a piece, under the current weights."""
    first = trajectories[call.pieces[0].group]
    at = slice(call.steps.start - first.window.start, call.steps.stop - first.window.start)
    timesteps, coefficients = first.timesteps[at], first.coefficients[at]
    if len(call.steps) == 1:
        # the scalar form of the rollout, so that the arithmetic and hence the ratio is equal to the bit
        timesteps, coefficients = timesteps[0], coefficients[0]
    else:
        size = call.pieces[0].last - call.pieces[0].first
        timesteps, coefficients = timesteps.repeat_interleave(size), coefficients.repeat_interleave(size)
    parts = [_of(piece, call.steps, trajectories[piece.group], advantages[piece.group]) for piece in call.pieces]
    now, following, old, advantage = (_joined(tensors) for tensors in zip(*parts, strict=True))
    scales = [
        (len(policy.diffusion) - trajectories[piece.group].window.start) / len(policy.diffusion)
        if clips.scale_by_window
        else 1.0
        for piece in call.pieces
    ]
    scale: float | Tensor = scales[0]
    if any(other != scale for other in scales):
        counts = torch.tensor([piece.last - piece.first for piece in call.pieces])
        scale = torch.tensor(scales).repeat_interleave(counts).to(now.device)
    return clipped_surrogate(
        policy.model_output(now, timesteps) if call.output is None else call.output,
        now,
        following,
        coefficients,
        old,
        advantage,
        clips.clip_range,
        advantage_clip=clips.advantage_clip,
        window_scale=scale,
        loss_weight=loss_weight,
        backend=policy.kernels,
    )


def _of(piece: Piece, steps: range, trajectory: Trajectory, advantage: Tensor) -> tuple[Tensor, ...]:
    """Latents and next latents [n, C, H, W], old log-probs and advantages [n] of a piece's samples × steps."""
    first, last = steps.start - trajectory.window.start, steps.stop - trajectory.window.start
    return (
        trajectory.latents[first:last, piece.samples].flatten(0, 1),
        trajectory.latents[first + 1 : last + 1, piece.samples].flatten(0, 1),
        trajectory.old_log_prob[first:last, piece.samples].flatten(),
        advantage[piece.samples].repeat(len(steps)),
    )


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


@torch.enable_grad()
def replay_ratio_error(policy: Policy, trajectories: Mapping[int, Trajectory], calls: Iterable[Call]) -> float:
    """Largest |ratio − 1| when fresh trajectories are scored again under unchanged weights: 0 if replay is exact.

    With gradient on, as the update does it: a compiled UNet is another graph then, an attention may be another kernel.
    """
    worst = torch.zeros((), device=policy.device)
    advantages = {g: torch.zeros(t.group_size, device=policy.device) for g, t in trajectories.items()}
    clips = Clips(clip_range=1.0, advantage_clip=math.inf, scale_by_window=False)
    for call in calls:
        ratio = _score(policy, trajectories, advantages, call, clips).ratio.detach()
        worst = torch.maximum(worst, (ratio - 1).abs().max())
    return float(worst)
