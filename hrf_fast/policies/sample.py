"""Draw from a policy: starting noise, an anchor taken back to a step, one denoising step, whole images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hrf_fast.noise import NoiseKey
from hrf_fast.policies.base import Condition, Policy, Prediction
from hrf_fast.policies.sampler import Sampler
from hrf_fast.prompts import Prompt
from hrf_kernels import StepCoefficients, gaussian_mean, gaussian_step, philox_normal

# counter value for a sample's starting noise: no denoising step has it
_START = 0xFFFFFFFF


def starting_noise(policy: Policy, noise: NoiseKey) -> Tensor:
    """Standard normal latents [B, *latent_shape], one per sample id."""
    return philox_normal(policy.latent_shape, seed=noise.key, sample_id=noise.sample_id, step=_START)


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
        seed=noise.key,
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

    def run(latents: Tensor, part: NoiseKey, condition: Condition) -> Tensor:
        for step in range(len(policy.sampler)):
            latents, _ = advance(policy, policy.predict(latents, step, condition), latents, step, part)
        return latents

    return _denoise(policy, noise, prompts, run, images_per_call=images_per_call, guided=guided)


@torch.no_grad()
def sample_deterministic(
    policy: Policy,
    noise: NoiseKey,
    prompts: Sequence[Prompt | None],
    *,
    steps: int,
    images_per_call: int,
    guided: bool = True,
) -> Tensor:
    """Denoise pure noise by `steps` of the T steps, without noise; other arguments and the result as `sample`."""
    numbers, coefficients = deterministic_jumps(policy.sampler, steps)

    def run(latents: Tensor, part: NoiseKey, condition: Condition) -> Tensor:
        for index, step in enumerate(numbers):
            prediction = policy.predict(latents, step, condition)
            latents = gaussian_mean(prediction.combined, latents, coefficients[index])
        return latents

    return _denoise(policy, noise, prompts, run, images_per_call=images_per_call, guided=guided)


@torch.no_grad()
def sample_as_released(
    policy: Policy, noise: NoiseKey, prompts: Sequence[Prompt | None], *, steps: int, images_per_call: int
) -> Tensor:
    """Denoise pure noise by the steps of `Policy.deterministic_sampler`, any number of them.

    The other arguments and the result are those of `sample`.
    """

    def run(latents: Tensor, part: NoiseKey, condition: Condition) -> Tensor:
        for step in range(steps):
            latents = follow(policy, policy.predict(latents, step, condition), latents, step)
        return latents

    with _stepping_by(policy, policy.deterministic_sampler(steps)):
        return _denoise(policy, noise, prompts, run, images_per_call=images_per_call, guided=True)


@contextmanager
def _stepping_by(policy: Policy, sampler: Sampler) -> Iterator[None]:
    """A block in which the policy has another sampler."""
    before, policy.sampler = policy.sampler, sampler
    try:
        yield
    finally:
        policy.sampler = before


def _denoise(
    policy: Policy,
    noise: NoiseKey,
    prompts: Sequence[Prompt | None],
    run: Callable[[Tensor, NoiseKey, Condition], Tensor],
    *,
    images_per_call: int,
    guided: bool,
) -> Tensor:
    """Clean latents [N, *latent_shape], made by `run` of the starting noise of `images_per_call` samples at a time."""
    chunks: list[Tensor] = []
    for part in noise.split(images_per_call):
        first = len(chunks) * images_per_call
        condition = policy.condition(prompts[first : first + len(part)], guided=guided)
        chunks.append(run(starting_noise(policy, part), part, condition))
    return torch.cat(chunks)


def deterministic_jumps(sampler: Sampler, count: int) -> tuple[list[int], StepCoefficients]:
    """`count` of the sampler's T steps, evenly spaced from the first on, and the way from each to the next.

    DDIM's equation 12 with eta 0 (arXiv 2010.02502): signal'·x̂0 + noise'·ε̂, with ε̂ = (x − signal·x̂0)/noise of the
    estimate without its clamp. The last one goes to the clean image, x̂0 itself.

    Returns:
        The steps, and [count] coefficients for `gaussian_mean`.
    """
    numbers = [index * len(sampler) // count for index in range(count)]
    table = sampler.coefficients
    values = (sampler.signal, sampler.noise, table.x0_latents, table.x0_output)
    signal, noise, of_latents, of_output = (value.double()[numbers] for value in values)
    next_signal, next_noise = (torch.cat([v[1:], v.new_full((1,), end)]) for v, end in ((signal, 1.0), (noise, 0.0)))
    jumps = {
        "x0_latents": of_latents,
        "x0_output": of_output,
        "mean_x0": next_signal,
        "mean_latents": next_noise * (1 - signal * of_latents) / noise,
        "mean_output": -next_noise * signal * of_output / noise,
        "std": torch.zeros_like(signal),
    }
    return numbers, StepCoefficients(**{name: v.float() for name, v in jumps.items()}, x0_clip=table.x0_clip)
