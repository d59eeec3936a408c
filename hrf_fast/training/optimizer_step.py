"""Optimizer step: every window step of every trajectory of a step's groups, then one step of the optimizer.

A window step's prediction comes from the rollout, which has kept its graph, or from a replay under the current weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hrf_fast.distributed import comm
from hrf_fast.engines.base import Engine
from hrf_fast.policies.base import Condition, Policy, Prediction
from hrf_fast.training.calls import Call, Piece
from hrf_fast.training.gradient_noise import GradientHalves
from hrf_fast.training.metrics import StepStats
from hrf_fast.training.reference import NO_REFERENCE, ReferenceWeights
from hrf_fast.training.trajectory import Trajectory, cat
from hrf_fast.windows.base import Window
from hrf_kernels import Surrogate, clipped_surrogate


@dataclass(frozen=True)
class Clips:
    """The bounds of DDPO's loss, and how HRF scales them."""

    clip_range: float
    """ε of the ratio's range."""
    advantage_clip: float
    """Bound on |advantage|."""
    scale_by_window: bool
    """Multiply both by `window_share` of each group."""
    step_weights: Tensor | None = None
    """[T], factors of the loss by step; None for 1. See `training.step_weights`."""
    range_factors: Tensor | None = None
    """[T], factors of ε by step; None for 1. See `training.step_weights.range_factors`."""


def optimizer_step(
    engine: Engine,
    policy: Policy,
    trajectories: Mapping[int, Trajectory],
    advantages: Mapping[int, Tensor],
    calls: Iterable[Call],
    clips: Clips,
    *,
    reference: ReferenceWeights = NO_REFERENCE,
    pairs: int | None = None,
    padding: int = 0,
    measure: bool = False,
    factor: float = 1.0,
) -> StepStats:
    """Make one optimizer step on some groups (DDPO, arXiv 2305.13301; HRF, arXiv 2410.08315).

    The loss of a group is the sum over its window's steps of the mean over its samples; groups are averaged.

    Args:
        trajectories: this rank's groups, whose windows may differ; advantages: fp32 for each, [B], or [S, B] by step.
        calls: which steps and samples share a network call; together every step of every window once, or those that
            a thinned update is left with. A call that comes with its prediction is not made again.
        reference: weights of the terms that hold the policy to the pretrained model, which the rollout has asked.
        pairs: samples × steps of the groups of all ranks, if there are other ranks.
        padding: zero-weight forwards that the engine adds so that all ranks make equally many; they are not counted.
        measure: measure the gradient's signal and noise; no call then has groups of even and of odd numbers.
        factor: of the loss, for a thinned update.

    Returns:
        StepStats: the loss as differentiated, the rest over every sample and step.

    Raises:
        FloatingPointError: a gradient is not finite; the weights are as they were, on every rank.
        ValueError: compute.deterministic is on, and an operation of the network has no deterministic form.
    """
    totals = StepStats.zeros(policy.device)
    pairs = pairs or sum(trajectory.old_log_prob.numel() for trajectory in trajectories.values())
    weight = factor / sum(trajectory.group.size for trajectory in trajectories.values())
    halves = GradientHalves(engine) if measure else None
    with engine.accumulating():
        for call in halves.in_order(calls) if halves else calls:
            surrogate = call_surrogate(
                policy, trajectories, advantages, call, clips, reference=reference, loss_weight=weight
            )
            loss = surrogate.loss.sum()
            totals = totals.add(loss.detach() / comm.world_size(), surrogate)
            with policy.stopwatch.running():
                engine.backward(loss, kept=call.prediction is not None)
            policy.calls.backwards += call.images * trajectories[call.pieces[0].group].group.condition.branches
        with policy.stopwatch.running():
            engine.finish(padding)
        if halves:
            halves.end()
    return totals.finish(pairs, engine.step(), halves.signal_and_noise(len(trajectories)) if halves else None)


def call_surrogate(
    policy: Policy,
    trajectories: Mapping[int, Trajectory],
    advantages: Mapping[int, Tensor],
    call: Call,
    clips: Clips,
    *,
    reference: ReferenceWeights = NO_REFERENCE,
    loss_weight: float = 1.0,
) -> Surrogate:
    """The clipped loss of a call's samples and steps, step by step within a piece, under the current weights."""
    rows = [_rows(piece, call.steps, trajectories[piece.group], advantages[piece.group]) for piece in call.pieces]
    latents, next_latents, old_log_prob, advantage = (cat(tensors) for tensors in zip(*rows, strict=True))
    prediction = call.prediction
    advantage_clip: float | Tensor = clips.advantage_clip
    # one step: the scalar form of the rollout, so that the arithmetic and hence the ratio is equal to the bit
    steps: int | Tensor = call.steps.start
    if len(call.steps) > 1:
        # made on the device: a copy of a list to a GPU waits for the GPU
        steps = torch.arange(call.steps.start, call.steps.stop, device=latents.device)
        steps = steps.repeat_interleave(call.pieces[0].size)
    if clips.step_weights is not None:
        # the loss is proportional to the advantage, so that its weight and that of its clip are the loss's
        weights = clips.step_weights[steps].expand_as(advantage)
        advantage, advantage_clip = advantage * weights, advantage_clip * weights
    clip_range: float | Tensor = clips.clip_range
    if clips.range_factors is not None:
        clip_range = clip_range * clips.range_factors[steps].expand_as(advantage)
    if prediction is None:
        conditions = [trajectories[piece.group].group.condition[piece.samples] for piece in call.pieces]
        condition = Condition.join([part.repeat(len(call.steps)) for part in conditions])
        prediction = policy.predict(latents, steps, condition)
    coefficients = policy.sampler.coefficients[steps]
    held = call.steps.start < reference.steps
    return clipped_surrogate(
        prediction.model_output,
        latents,
        next_latents,
        coefficients,
        old_log_prob,
        advantage,
        clip_range,
        advantage_clip=advantage_clip,
        window_scale=_window_scale(policy, trajectories, call) if clips.scale_by_window else 1.0,
        loss_weight=loss_weight,
        unconditional_output=prediction.unconditional_output,
        guidance_scale=prediction.guidance_scale,
        reference_output=_reference_output(trajectories, call, prediction) if held else None,
        kl_weight=reference.per_row(steps, coefficients.std, len(latents)) if held else 0.0,
        backend=policy.kernels,
    )


def _rows(piece: Piece, steps: range, trajectory: Trajectory, advantage: Tensor) -> tuple[Tensor, ...]:
    """Latents and next latents [n, *latent_shape], old log-probs and advantages [n] of a piece's samples × steps."""
    first, last = steps.start - trajectory.window.start, steps.stop - trajectory.window.start
    return (
        trajectory.latents[first:last, piece.samples].flatten(0, 1),
        trajectory.latents[first + 1 : last + 1, piece.samples].flatten(0, 1),
        trajectory.old_log_prob[first:last, piece.samples].flatten(),
        advantage[first:last, piece.samples].flatten()
        if advantage.dim() > 1
        else advantage[piece.samples].repeat(len(steps)),
    )


def _reference_output(trajectories: Mapping[int, Trajectory], call: Call, prediction: Prediction) -> Tensor:
    """The pretrained model's output at a call's rows; the policy's own, whose KL is 0, where that was not asked."""
    parts = []
    for piece in call.pieces:
        trajectory = trajectories[piece.group]
        assert trajectory.reference is not None, "the rollout was not asked for the pretrained model's outputs"
        first, last = (step - trajectory.window.start for step in (call.steps.start, call.steps.stop))
        parts.append(trajectory.reference[first:last, piece.samples].flatten(0, 1))
    known = cat(parts)
    # several steps are of one piece, so that the last rows are those of the last steps
    return (
        known if len(known) == call.images else torch.cat([known, prediction.detach().combined[len(known) :].float()])
    )


def _window_scale(policy: Policy, trajectories: Mapping[int, Trajectory], call: Call) -> float | Tensor:
    """The windows' shares of the T steps: one number where they are equal for all pieces, else one per row."""
    sampler = policy.sampler
    windows = [trajectories[piece.group].window for piece in call.pieces]
    scales = [window_share(window, sampler.stochastic_steps, len(sampler)) for window in windows]
    if len(set(scales)) == 1:
        return scales[0]
    counts = [piece.size * len(call.steps) for piece in call.pieces]
    # fills, which a GPU does by itself; a copy of a list to it waits for it
    return torch.cat([torch.full((n,), scale, device=policy.device) for n, scale in zip(counts, scales, strict=True)])


def window_share(window: Window, stochastic: int, total: int) -> float:
    """(T − start)/T, as HRF scales by (arXiv 2410.08315), or (stop − start)/T for a window that ends before.

    Args:
        stochastic: steps that can be trained; the deterministic ones after them belong to a window that reaches them.
    """
    return ((total if window.stop == stochastic else window.stop) - window.start) / total


def replay_ratios(
    policy: Policy, trajectories: Mapping[int, Trajectory], calls: Iterable[Call], *, as_in_update: bool = False
) -> Tensor:
    """The ratio [samples × steps of all calls] of trajectories under the current weights.

    Args:
        as_in_update: with gradient on: a compiled UNet is another graph then, an attention may be another kernel.
    """
    advantages = {number: torch.zeros(t.group.size, device=policy.device) for number, t in trajectories.items()}
    clips = Clips(clip_range=1.0, advantage_clip=math.inf, scale_by_window=False)
    with torch.set_grad_enabled(as_in_update):
        return torch.cat(
            [call_surrogate(policy, trajectories, advantages, call, clips).ratio.detach() for call in calls]
        )
