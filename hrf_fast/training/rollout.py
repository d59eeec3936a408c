"""Rollout: denoise and keep the window.

Anchors and panels run all T steps; a group starts where its window starts. Nothing outside the window is kept, and
nothing there runs with gradient. The policy that samples here is the "old" policy of the ratio. All noise is
counter-based (seed, sample, step), so that a result does not depend on how a batch is split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hrf_fast.noise import NoiseKey
from hrf_fast.policies.pixel import Policy
from hrf_fast.policies.sample import advance, starting_noise
from hrf_fast.training.calls import Call, Piece, rollout_calls
from hrf_fast.training.trajectory import Trajectory
from hrf_fast.windows.base import Window


def renoised(policy: Policy, anchor: Tensor, step: int, noise: NoiseKey) -> Tensor:
    """The anchor [C, H, W] taken back to `step` with each sample's own noise, [B, C, H, W]."""
    return policy.diffusion.renoise(anchor, step, starting_noise(policy, noise))


@dataclass(frozen=True)
class Start:
    """Where a group's rollout begins."""

    window: Window
    """Steps to keep; those after it run and are not kept."""
    latents: Tensor
    """[B, C, H, W] at step window.start."""
    noise: NoiseKey
    """Of the group's samples."""


@torch.no_grad()
def rollout(
    policy: Policy,
    starts: Mapping[int, Start],
    *,
    micro_batch_size: int,
    max_batch: int = 0,
    keep_from: int | None = None,
) -> tuple[dict[int, Trajectory], list[Call]]:
    """Denoise groups from their windows' starts to the clean image.

    Args:
        starts: by group, of equal sizes; they advance together.
        micro_batch_size, max_batch: see `rollout_calls`.
        keep_from: window steps from this one on run with gradient and keep their graphs; None for no step.

    Returns:
        The trajectories by group, and the UNet calls inside the windows in the order in which they were made. Replayed
        as they are they see the batches of the rollout, and the on-policy ratio is 1 to the bit.
    """
    windows = {group: start.window for group, start in starts.items()}
    trajectories = {group: _empty(policy, start) for group, start in starts.items()}
    size = len(next(iter(starts.values())).latents)
    # apart from what is stored: a tensor that a kept graph has seen must not be written to
    now: dict[Piece, Tensor] = {}
    made = []
    batches: dict[str, Any] = {"micro_batch_size": micro_batch_size, "max_batch": max_batch}
    for call in rollout_calls(windows, group_size=size, num_steps=len(policy.diffusion), **batches):
        step = call.steps.start
        latents = [now.get(piece, starts[piece.group].latents[piece.samples]) for piece in call.pieces]
        batch = latents[0] if len(latents) == 1 else torch.cat(latents)
        keep = call.inside and keep_from is not None and step >= keep_from
        with torch.set_grad_enabled(keep):
            output = policy.model_output(batch, policy.timestep_list[step])
        noise = NoiseKey.join([starts[piece.group].noise[piece.samples] for piece in call.pieces])
        following, log_prob = advance(policy, output.detach(), batch, step, noise)
        sizes = [piece.last - piece.first for piece in call.pieces]
        for piece, latent, score in zip(call.pieces, following.split(sizes), log_prob.split(sizes), strict=True):
            now[piece] = latent
            if call.inside:
                trajectory, index = trajectories[piece.group], step - windows[piece.group].start
                trajectory.latents[index + 1, piece.samples] = latent
                trajectory.old_log_prob[index, piece.samples] = score
        if call.inside:
            call.output = output if keep else None
            made.append(call)
    for piece, latent in now.items():
        trajectories[piece.group].images[piece.samples] = policy.images(latent)
    return trajectories, made


def _empty(policy: Policy, start: Start) -> Trajectory:
    """A trajectory that holds its first latents, for the rollout to fill."""
    window, latents = start.window, start.latents
    kept = slice(window.start, window.stop)
    stored = latents.new_empty(len(window) + 1, *latents.shape)
    stored[0] = latents
    return Trajectory(
        window=window,
        latents=stored,
        old_log_prob=latents.new_empty(len(window), len(latents)),
        timesteps=policy.diffusion.timesteps[kept],
        coefficients=policy.diffusion.coefficients[kept],
        images=latents.new_empty(len(latents), 3, *latents.shape[2:]),
    )
