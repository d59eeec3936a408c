"""Rollout: denoise and keep the window.

A group starts where its window starts, and its samples run on to the clean image. Nothing outside the window is kept,
and nothing there runs with gradient. The policy that samples here is the "old" policy of the ratio. All noise is
counter-based (seed, sample, step), so that a result does not depend on how a batch is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hrf_fast.noise import NoiseKey
from hrf_fast.policies.base import Condition, Policy
from hrf_fast.policies.sample import advance, follow, renoised, starting_noise
from hrf_fast.training.calls import Call, CallPlan, Piece
from hrf_fast.training.groups import Group
from hrf_fast.training.trajectory import Trajectory, cat
from hrf_kernels import gaussian_mean


@dataclass
class Rollout:
    """Groups that a rank has rolled out together."""

    trajectories: dict[int, Trajectory] = field(default_factory=dict)
    """By group."""
    calls: list[Call] = field(default_factory=list)
    """The calls inside the windows in the order in which they were made, with the predictions that were kept."""
    estimates: dict[int, Tensor] = field(default_factory=dict)
    """[S, B, 3, H, W] in [0, 1] by group: the clean images that were predicted at each window step, where asked for."""

    def join(self, other: Rollout) -> None:
        """Add another pack's, less its estimates: what is learnt from these are their rewards."""
        self.trajectories |= other.trajectories
        self.calls += other.calls


@torch.no_grad()
def rollout(
    policy: Policy,
    pack: Sequence[Group],
    plan: CallPlan,
    *,
    keep_from: int | None = None,
    reference_steps: int = 0,
    estimate: bool = False,
) -> Rollout:
    """Denoise groups that share calls from their windows' starts to the clean image.

    Args:
        pack: groups of equal sizes; they advance together.
        keep_from: window steps from this one on run with gradient and keep their graphs; None for no step.
        reference_steps: at window steps before this one the pretrained model is asked too. Its output depends on no
            weight that is trained, so the rollout has it once for all passes of the update.
        estimate: decode the clean images that are predicted at the window's steps too.

    Returns:
        The trajectories and the calls. Replayed as they are the calls see the batches of the rollout, and the on-policy
        ratio is 1 to the bit.
    """
    groups = {group.number: group for group in pack}
    # of one schedule, so that all windows are alike
    deterministic = pack[0].window.deterministic
    starts = {group.number: _start(policy, group) for group in pack}
    stored = {group.number: _storage(group, starts[group.number]) for group in pack}
    references = {group.number: _reference_storage(group, starts[group.number], reference_steps) for group in pack}
    estimates = {group.number: torch.empty_like(stored[group.number][0][1:]) for group in pack} if estimate else {}
    # apart from what is stored: a tensor that a kept graph has seen must not be written to
    current: dict[Piece, Tensor] = {}
    trained = []
    for call in plan.rollout({group.number: group.window for group in pack}, len(policy.sampler)):
        step = call.steps.start
        latents = cat([current.get(piece, starts[piece.group][piece.samples]) for piece in call.pieces])
        condition = Condition.join([groups[piece.group].condition[piece.samples] for piece in call.pieces])
        noise = NoiseKey.join([groups[piece.group].noise[piece.samples] for piece in call.pieces])
        keep = call.trained and keep_from is not None and step >= keep_from
        with torch.set_grad_enabled(keep):
            prediction = policy.predict(latents, step, condition)
        if call.trained or not deterministic:
            next_latents, log_prob = advance(policy, prediction.detach(), latents, step, noise)
        else:
            next_latents = follow(policy, prediction, latents, step)
        sizes = [piece.size for piece in call.pieces]
        current |= zip(call.pieces, next_latents.split(sizes), strict=True)
        if call.trained and estimate:
            clean = gaussian_mean(prediction.detach().combined, latents, policy.sampler.clean[step])
            for piece, part in zip(call.pieces, clean.split(sizes), strict=True):
                estimates[piece.group][step - groups[piece.group].window.start, piece.samples] = part
        if call.trained and step < reference_steps:
            output = policy.reference(latents, step, condition)
            for piece, part in zip(call.pieces, output.split(sizes), strict=True):
                references[piece.group][step - groups[piece.group].window.start, piece.samples] = part
        if call.trained:
            for piece, piece_log_prob in zip(call.pieces, log_prob.split(sizes), strict=True):
                window_latents, old_log_prob = stored[piece.group]
                index = step - groups[piece.group].window.start
                window_latents[index + 1, piece.samples] = current[piece]
                old_log_prob[index, piece.samples] = piece_log_prob
            call.prediction = prediction if keep else None
            trained.append(call)
    images = {piece: policy.decode(latents) for piece, latents in sorted(current.items())}
    trajectories = {}
    for group in pack:
        parts = [part for piece, part in images.items() if piece.group == group.number]
        reference = references[group.number] if len(references[group.number]) else None
        trajectories[group.number] = Trajectory(group, *stored[group.number], cat(parts), reference)
    return Rollout(trajectories, trained, {number: _decoded(policy, clean) for number, clean in estimates.items()})


def _start(policy: Policy, group: Group) -> Tensor:
    """Latents [B, *latent_shape] at the window's first step: pure noise, an anchor taken back, or a prefix."""
    if group.origin is not None:
        return group.origin
    noise = group.noise[:1] if group.window.shared else group.noise
    if group.anchor is None:
        start = starting_noise(policy, noise)
    else:
        start = renoised(policy, group.anchor, group.window.start, noise)
    return start.expand(group.size, *policy.latent_shape).contiguous()


def _storage(group: Group, start: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [S+1, B, *latent_shape], of which the first are set, and log-probs [S, B], for the rollout to fill."""
    latents = start.new_empty(len(group.window) + 1, *start.shape)
    latents[0] = start
    return latents, start.new_empty(len(group.window), group.size)


def _reference_storage(group: Group, start: Tensor, reference_steps: int) -> Tensor:
    """Room [R, B, *latent_shape] for the pretrained model's outputs at the R window steps before `reference_steps`."""
    count = max(0, min(group.window.stop, reference_steps) - group.window.start)
    return start.new_empty(count, *start.shape)


def _decoded(policy: Policy, latents: Tensor) -> Tensor:
    """Images [S, B, 3, H, W] of latents [S, B, *latent_shape], decoded a step at a time."""
    return torch.stack([policy.decode(step) for step in latents])
