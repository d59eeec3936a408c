"""Draw from a policy: starting noise, an anchor taken back to a step, one denoising step, whole images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hrf_fast.noise import NoiseKey
from hrf_fast.policies.base import Policy, Prediction
from hrf_fast.prompts import Prompt
from hrf_kernels import gaussian_mean, gaussian_step, philox_normal

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


def follow(policy: Policy, prediction: Prediction, latents: Tensor, step: int) -> Tensor:
    """The latents after `step` [B, *latent_shape] without noise: by DDIM with eta 0, or by a flow's ODE."""
    return gaussian_mean(prediction.combined, latents, policy.sampler.deterministic[step])


@torch.no_grad()
def sample(
    policy: Policy,
    noise: NoiseKey,
    prompts: Sequence[Prompt | None] | None = None,
    *,
    images_per_call: int,
    guided: bool = True,
) -> Tensor:
    """Denoise pure noise over all T steps.

    Args:
        prompts: one per sample; None for a model that takes none.
        images_per_call: at most; guided: see `Policy.condition`.

    Returns:
        Clean latents [N, *latent_shape] fp32, a function of the noise key and the weights.
    """
    prompts = [None] * len(noise) if prompts is None else prompts
    chunks: list[Tensor] = []
    for part in noise.split(images_per_call):
        latents = starting_noise(policy, part)
        first = len(chunks) * images_per_call
        condition = policy.condition(prompts[first : first + len(part)], guided=guided)
        for step in range(len(policy.sampler)):
            latents, _ = advance(policy, policy.predict(latents, step, condition), latents, step, part)
        chunks.append(latents)
    return torch.cat(chunks)
