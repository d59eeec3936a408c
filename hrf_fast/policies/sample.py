"""Sample: draw from a policy, without gradient: starting noise, one denoising step, whole images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hrf_fast.noise import NoiseKey
from hrf_fast.policies.pixel import Policy
from hrf_kernels import gaussian_step, philox_normal

# counter value for a sample's starting noise: no denoising step has it
_START = 0xFFFFFFFF


def starting_noise(policy: Policy, noise: NoiseKey) -> Tensor:
    """Standard normal latents [B, C, H, W], one per sample id."""
    return philox_normal(policy.image_shape, seed=noise.seed, sample_id=noise.sample_id, step=_START)


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
            output = policy.model_output(latents, policy.timestep_list[step])
            latents, _ = advance(policy, output, latents, step, part)
        chunks.append(latents)
    return torch.cat(chunks)


def advance(policy: Policy, output: Tensor, latents: Tensor, step: int, noise: NoiseKey) -> tuple[Tensor, Tensor]:
    """The latents after `step` [B, C, H, W], drawn from the policy, and their log-prob [B]."""
    coefficients = policy.diffusion.coefficients[step]
    key: dict[str, Any] = {"seed": noise.seed, "sample_id": noise.sample_id, "step": step}
    return gaussian_step(output, latents, coefficients, **key, backend=policy.kernels)
