"""Rollout: denoise and keep the window.

A group starts where its window starts, and its samples run on to the clean image. Nothing outside the window is kept,
and nothing there runs with gradient. The policy that samples here is the "old" policy of the ratio. All noise is
counter-based (seed, sample, step), so that a result does not depend on how a batch is split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hrf_fast.noise import NoiseKey
from hrf_fast.policies.base import Condition, Policy
from hrf_fast.policies.sample import advance, follow, renoised, starting_noise
from hrf_fast.training.calls import Call, CallPlan, Piece
from hrf_fast.training.groups import Group
from hrf_fast.training.trajectory import Trajectory, cat
from hrf_fast.windows.base import Window
from hrf_kernels import gaussian_mean


@dataclass
class Rollout:
    """Groups that a rank has rolled out together."""

    trajectories: dict[int, Trajectory] = field(default_factory=dict)
    """By group."""
    calls: list[Call] = field(default_factory=list)
    """The calls inside the windows in the order in which they were made, with the predictions that were kept."""
    images: dict[int, Tensor] = field(default_factory=dict)
    """[B, 3, H, W] fp32 in [0, 1] by group: the clean images that the trajectories led to."""
    estimates: dict[int, Tensor] = field(default_factory=dict)
    """[S, B, 3, H, W] in [0, 1] by group: the clean images that were predicted at each window step, where asked for."""
    after: dict[int, Tensor] = field(default_factory=dict)
    """[B, 3, H, W] by group: those at the window's end, of the groups whose windows noise follows."""

    def join(self, other: Rollout) -> None:
        """Add another pack's, less its images and estimates: what is learnt from these are their rewards."""
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
        estimate: decode the clean images that are predicted at the window's steps too, and at its end where noise
            follows.

    Returns:
        The trajectories and the calls. Replayed as they are the calls see the batches of the rollout, and the on-policy
        ratio is 1 to the bit.
    """
    groups = {group.number: group for group in pack}
    # of one schedule, so that all windows are alike
    deterministic = pack[0].window.deterministic
    starts = {group.number: _start(policy, group) for group in pack}
    # by group: latents, the part of them that steps reach, log-probs, pretrained outputs, predicted clean latents
    paths, reached, log_probs, references, estimates = (dict[int, Tensor]() for _ in range(5))
    for number, group in groups.items():
        start, window = starts[number], group.window
        paths[number] = start.new_empty(len(window) + 1, *start.shape)
        paths[number][0], reached[number] = start, paths[number][1:]
        log_probs[number] = start.new_empty(len(window), group.size)
        references[number] = start.new_empty(max(0, min(window.stop, reference_steps) - window.start), *start.shape)
        rows = len(window) + _noise_follows(window, policy.sampler.stochastic_steps) if estimate else 0
        estimates[number] = start.new_empty(rows, *start.shape)

    def write(storage: Mapping[int, Tensor], call: Call, values: Tensor) -> None:
        """Put a call's rows where their groups have room for its step."""
        for piece, part in zip(call.pieces, values.split([piece.size for piece in call.pieces]), strict=True):
            index = call.steps.start - groups[piece.group].window.start
            if 0 <= index < len(storage[piece.group]):
                storage[piece.group][index, piece.samples] = part

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
        current |= zip(call.pieces, next_latents.split([piece.size for piece in call.pieces]), strict=True)
        if estimate and (call.trained or any(step == groups[piece.group].window.stop for piece in call.pieces)):
            write(estimates, call, gaussian_mean(prediction.detach().combined, latents, policy.sampler.clean[step]))
        if call.trained and step < reference_steps:
            write(references, call, policy.reference(latents, step, condition))
        if call.trained:
            write(reached, call, next_latents)
            write(log_probs, call, log_prob)
            call.prediction = prediction if keep else None
            trained.append(call)
    drawn = {piece: policy.decode(latents) for piece, latents in sorted(current.items())}
    trajectories, images = {}, {}
    for group in pack:
        number = group.number
        images[number] = cat([part for piece, part in drawn.items() if piece.group == number])
        reference = references[number] if len(references[number]) else None
        trajectories[number] = Trajectory(group, paths[number], log_probs[number], reference)
    decoded = {number: _decoded(policy, clean) for number, clean in estimates.items() if estimate}
    lengths = {number: len(groups[number].window) for number in decoded}
    return Rollout(
        trajectories,
        trained,
        images,
        {number: clean[: lengths[number]] for number, clean in decoded.items()},
        {number: clean[-1] for number, clean in decoded.items() if len(clean) > lengths[number]},
    )


def _noise_follows(window: Window, stochastic_steps: int) -> bool:
    """Whether untrained steps behind a window add noise."""
    return not window.deterministic and window.stop < stochastic_steps


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


def _decoded(policy: Policy, latents: Tensor) -> Tensor:
    """Images [S, B, 3, H, W] of latents [S, B, *latent_shape], decoded a step at a time."""
    return torch.stack([policy.decode(step) for step in latents])
