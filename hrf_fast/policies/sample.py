"""Draw from a policy: starting noise, an anchor taken back to a step, one denoising step, whole images."""

from __future__ import annotations

import torch
from torch import Tensor

from hrf_fast.noise import NoiseKey
from hrf_fast.policies.base import Policy, Prediction
from hrf_kernels import gaussian_step, philox_normal

# counter value for a sample's starting noise: no denoising step has it
_START = 0xFFFFFFFF


def starting_noise(policy: Policy, noise: NoiseKey) -> Tensor:
    """Standard normal latents [B, *latent_shape], one per sample id."""
    return philox_normal(policy.latent_shape, seed=noise.seed, sample_id=noise.sample_id, step=_START)


def renoised(policy: Policy, anchor: Tensor, step: int, noise: NoiseKey) -> Tensor:
    """The anchor [*latent_shape] taken back to `step` with each sample's own noise, [B, *latent_shape]."""
    return policy.sampler.renoise(anchor, step, starting_noise(policy, noise))


def advance(
    policy: Policy, prediction: Prediction, latents: Tensor, step: int, noise: NoiseKey
) -> tuple[Tensor, Tensor]:
    """The latents after `step` [B, *latent_shape], drawn from the policy, and their log-prob [B]."""
    return gaussian_step(
        prediction.model_output,
        latents,
        policy.sampler.coefficients[step],
        seed=noise.seed,
        sample_id=noise.sample_id,
        step=step,
        unconditional_output=prediction.unconditional_output,
        guidance_scale=prediction.guidance_scale,
        backend=policy.kernels,
    )


@torch.no_grad()
def sample(policy: Policy, noise: NoiseKey, *, images_per_call: int) -> Tensor:
    """Denoise pure noise over all T steps.

    Returns:
        Clean latents [N, *latent_shape] fp32, a function of the noise key and the weights.
    """
    chunks = []
    for part in noise.split(images_per_call):
        latents = starting_noise(policy, part)
        condition = policy.condition([None] * len(part))
        for step in range(len(policy.sampler)):
            latents, _ = advance(policy, policy.predict(latents, step, condition), latents, step, part)
        chunks.append(latents)
    return torch.cat(chunks)
