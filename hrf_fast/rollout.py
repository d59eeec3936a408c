"""Rollout: denoise without gradients and keep the window.

Anchors and panels run all T steps; a group starts where its window starts. Nothing outside the window is kept. The
policy that samples here is the "old" policy of the ratio. All noise is counter-based (seed, sample, step), so that a
result does not depend on how a batch is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hrf_fast.policy import Policy
from hrf_fast.rewards import Reward
from hrf_fast.seeds import NoiseKey
from hrf_fast.trajectory import Trajectory, Window
from hrf_kernels import gaussian_mean, gaussian_step, philox_normal

# counter value for a sample's starting noise: no denoising step has it
_START = 0xFFFFFFFF


def starting_noise(policy: Policy, noise: NoiseKey) -> Tensor:
    """Standard normal latents [B, C, H, W], one per sample id."""
    return philox_normal(policy.image_shape, seed=noise.seed, sample_id=noise.sample_id, step=_START)


def renoised(policy: Policy, anchor: Tensor, step: int, noise: NoiseKey) -> Tensor:
    """The anchor [C, H, W] taken back to `step` with each sample's own noise, [B, C, H, W]."""
    return policy.diffusion.renoise(anchor, step, starting_noise(policy, noise))


@torch.no_grad()
def sample(policy: Policy, noise: NoiseKey, *, batch_size: int) -> Tensor:
    """Denoise pure noise over all T steps.

    Returns:
        Clean latents [N, C, H, W] fp32, a function of the noise key and the weights.
    """
    chunks = []
    for part in noise.split(batch_size):
        latents = starting_noise(policy, part)
        for step in range(len(policy.diffusion)):
            latents, _ = _advance(policy, latents, step, part)
        chunks.append(latents)
    return torch.cat(chunks)


@torch.no_grad()
def rollout(policy: Policy, window: Window, start: Tensor, noise: NoiseKey, *, micro_batch_size: int) -> Trajectory:
    """Denoise a group from its window's start to the clean image.

    Args:
        window: steps to keep; the deterministic steps after it run and are not kept.
        start: [B, C, H, W] latents at step window.start.
        noise: of the group's samples.
        micro_batch_size: images per UNet call; the update replays with the same split.
    """
    table = policy.diffusion
    stored = start.new_empty(len(window) + 1, *start.shape)
    old_log_prob = start.new_empty(len(window), len(start))
    images = []
    for first in range(0, len(start), micro_batch_size):
        part = slice(first, first + micro_batch_size)
        latents = stored[0, part] = start[part]
        for step in range(window.start, len(table)):
            latents, log_prob = _advance(policy, latents, step, noise[part])
            if step < window.stop:
                index = step - window.start
                stored[index + 1, part], old_log_prob[index, part] = latents, log_prob
        images.append(policy.images(latents))
    kept = slice(window.start, window.stop)
    return Trajectory(
        window=window,
        latents=stored,
        old_log_prob=old_log_prob,
        timesteps=table.timesteps[kept],
        coefficients=table.coefficients[kept],
        images=torch.cat(images),
    )


def _advance(policy: Policy, latents: Tensor, step: int, noise: NoiseKey) -> tuple[Tensor, Tensor]:
    output = policy.model_output(latents, policy.timestep_list[step])
    coefficients = policy.diffusion.coefficients[step]
    key: dict[str, Any] = {"seed": noise.seed, "sample_id": noise.sample_id, "step": step}
    return gaussian_step(output, latents, coefficients, **key, backend=policy.kernels)


@torch.no_grad()
def probe_starts(
    policy: Policy, reward: Reward, anchor: Tensor, candidates: Sequence[int], noise: NoiseKey, *, batch_size: int
) -> tuple[Tensor, Tensor]:
    """HRF-D's search for one anchor: denoise its group deterministically from every candidate start.

    Args:
        anchor: [C, H, W] clean latents; noise: re-noises the anchor, once per sample of the group.

    Returns:
        Mean reward and mean distance 1 − cos(x̃0, x0) on flattened pixels over the whole group, each [C] fp32.
    """
    rewards, distances = [], []
    flat_anchor = anchor.flatten()[None]
    for start in candidates:
        clean = []
        for part in noise.split(batch_size):
            latents = renoised(policy, anchor, start, part)
            for step in range(start, len(policy.diffusion)):
                output = policy.model_output(latents, policy.timestep_list[step])
                latents = gaussian_mean(output, latents, policy.diffusion.deterministic[step])
            clean.append(latents)
        group = torch.cat(clean)
        rewards.append(reward(policy.images(group)).mean())
        distances.append(1 - torch.cosine_similarity(group.flatten(1), flat_anchor).mean())
    return torch.stack(rewards), torch.stack(distances)
