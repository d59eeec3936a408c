"""SD3 and FLUX: the pipelines' own embeddings, latents and images."""

import pytest
import torch

from hrf_fast.noise import NoiseKey
from hrf_fast.policies.sample import starting_noise
from hrf_fast.prompts import Prompt
from hrf_kernels import gaussian_mean
from tests.flow_models import KINDS, SIDE, SIZE, flow_model, load_flow_policy, load_pipeline

TEXTS, NEGATIVES = ["a red cat", "dog"], ["red", ""]


def prompts():
    return [Prompt(*texts) for texts in zip(TEXTS, NEGATIVES, strict=True)]


@torch.no_grad()
def ode(policy, condition, latents):
    """Clean latents by the deterministic rule."""
    for step in range(len(policy.sampler)):
        latents = gaussian_mean(
            policy.predict(latents, step, condition).combined, latents, policy.sampler.deterministic[step]
        )
    return latents


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_the_policy_draws_what_the_pipeline_draws(kind, guided):
    options = {} if guided or kind == "schnell" else {"guidance_scale": 1.0}
    policy, pipeline = load_flow_policy(kind, **options), load_pipeline(flow_model(kind), kind)
    start = starting_noise(policy, NoiseKey(0, torch.arange(2)))
    negative = {"negative_prompt": NEGATIVES} if kind.startswith("sd3") else {}

    def draw(output):
        return pipeline(
            TEXTS,
            num_inference_steps=4,
            guidance_scale=policy.guidance_scale,
            latents=start.clone(),
            height=SIZE,
            width=SIZE,
            output_type=output,
            **negative,
        ).images

    latents = ode(policy, policy.condition(prompts()), start)
    torch.testing.assert_close(latents, draw("latent"), rtol=1e-5, atol=1e-5)
    assert torch.equal(policy.sampler.timesteps, pipeline.scheduler.timesteps)
    images = torch.from_numpy(draw("np")).permute(0, 3, 1, 2)
    assert images.shape == (2, 3, 2 * SIDE, 2 * SIDE)
    torch.testing.assert_close(policy.decode(latents), images, rtol=0, atol=1e-5)
