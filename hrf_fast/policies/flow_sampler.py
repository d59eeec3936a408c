"""StepCoefficients of flow-matching models from a FlowMatchEulerDiscreteScheduler, in float64.

A noisy sample is (1 − σ)·x0 + σ·noise, the network's output v = noise − x0, and a step goes from σ to σ' < σ, by
Δ = σ' − σ. Every rule is a Gaussian step N(a·latents + b·v, std²), with η the noise level:

    ode        a = 1                     b = Δ                                 std = 0
    flow_sde   a = 1 + s²Δ/(2σ)          b = Δ·(1 + s²(1 − σ)/(2σ))            std = s·√(−Δ)  with s = η·√(σ/(1 − σ))
    dance_sde  a, b and std of flow_sde with s = η
    cps        a = 1 − σ' + σ'·cos θ     b = −σ(1 − σ') + σ'(1 − σ)·cos θ      std = σ'·sin θ  with θ = η·π/2

flow_sde is Flow-GRPO (arXiv 2505.05470), dance_sde DanceGRPO (arXiv 2505.07818), cps Flow-CPS (arXiv 2509.05952). Their
log-prob here is the Gaussian's, per element. Flow-CPS publishes −(next − mean)² instead, without 1/(2·std²): a
difference of its log-probs is 2·std² times ours, and so is its clip range, see `published_cps_scale`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrf_fast.config.options import DDPM_SAMPLERS, FLOW_SAMPLERS, SampleConfig
from hrf_fast.policies.sampler import (
    DETERMINISTIC,
    Sampler,
    build_deterministic_sampler,
    build_sampler,
    check_least_std,
)
from hrf_fast.policies.schedulers import FLOW_SCHEDULER
from hrf_kernels import StepCoefficients

# float32 has steps of 6e-8 below 1, and some shifts round the first sigma
_ONE = 1 - 1e-6


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler of diffusers is one of flow matching."""
    return type(scheduler).__name__ == FLOW_SCHEDULER


def choose_sampler(
    scheduler: Any, sample: SampleConfig, *, image_tokens: int | None = None, linear_sigmas: bool = False
) -> Sampler:
    """The sampler of a model by its scheduler's class: `build_flow_sampler` or `build_sampler`.

    Raises:
        ValueError: a sampler of the other kind of model; else as those two.
    """
    kind, steps = sample.scheduler, sample.num_inference_steps
    if is_flow(scheduler):
        if kind not in FLOW_SAMPLERS:
            raise ValueError(
                f"sample.scheduler is {kind!r} but the model is one of flow matching (its scheduler is a "
                f"{FLOW_SCHEDULER}); use one of {', '.join(FLOW_SAMPLERS)}"
            )
        return build_flow_sampler(
            scheduler,
            kind=kind,
            num_inference_steps=steps,
            noise_level=sample.noise_level,
            image_tokens=image_tokens,
            linear_sigmas=linear_sigmas,
        )
    if kind in FLOW_SAMPLERS:
        raise ValueError(
            f"sample.scheduler is {kind!r} but the model is none of flow matching: its scheduler is a "
            f"{type(scheduler).__name__}; use one of {', '.join(DDPM_SAMPLERS)}"
        )
    return build_sampler(scheduler, kind=kind, num_inference_steps=steps, eta=sample.eta)


def choose_deterministic_sampler(
    scheduler: Any, *, num_inference_steps: int, image_tokens: int | None = None, linear_sigmas: bool = False
) -> Sampler:
    """The deterministic steps that diffusers takes by a model's scheduler: the ODE of a flow, or DDIM with eta 0.

    Args:
        num_inference_steps: at least 1; image_tokens, linear_sigmas: see `build_flow_sampler`.

    Raises:
        ValueError: more steps than were trained, or timesteps or sigmas that the scheduler can't space.
    """
    if not is_flow(scheduler):
        return build_deterministic_sampler(scheduler, num_inference_steps=num_inference_steps)
    timesteps, levels = scheduler_sigmas(
        scheduler,
        num_inference_steps=num_inference_steps,
        image_tokens=image_tokens,
        linear_sigmas=linear_sigmas,
        option=DETERMINISTIC,
    )
    ode = flow_coefficients(levels, kind="ode")
    return Sampler(timesteps, ode, ode, *_signal_and_noise(levels), stochastic_steps=0)


def build_flow_sampler(
    scheduler: Any,
    *,
    kind: str,
    num_inference_steps: int,
    noise_level: float | None = None,
    image_tokens: int | None = None,
    linear_sigmas: bool = False,
) -> Sampler:
    """Tables of a flow model's sampler.

    The last step goes to the clean image, where noise would stay in the picture (and Flow-CPS has none), so it is
    deterministic, with the mean of the ODE, and in no window. The published code of Flow-GRPO and DanceGRPO adds noise
    there; `flow_coefficients` has that step too.

    Args:
        scheduler: a FlowMatchEulerDiscreteScheduler; it is not changed.
        kind: flow_sde, dance_sde or cps.
        num_inference_steps: T.
        noise_level: η, above 0, for cps in (0, 1]; None for the one that the rule's authors publish.
        image_tokens: tokens of an image in the transformer, which a dynamic shift depends on.
        linear_sigmas: give the scheduler linspace(1, 1/T, T) to shift, as FluxPipeline does; StableDiffusion3Pipeline
            and DDPMPipeline leave sigmas to it.

    Raises:
        ValueError: an option out of range, sigmas that do not fall, or noise below float32's rounding.
    """
    noise_level = _check_flow(scheduler, kind, num_inference_steps, noise_level)
    timesteps, levels = scheduler_sigmas(
        scheduler, num_inference_steps=num_inference_steps, image_tokens=image_tokens, linear_sigmas=linear_sigmas
    )
    coefficients = flow_coefficients(levels, kind=kind, noise_level=noise_level)
    ode = flow_coefficients(levels, kind="ode")
    stochastic_steps = num_inference_steps - 1
    check_least_std(coefficients.std[:stochastic_steps], "sample.noise_level", noise_level)
    tables = {
        name: torch.cat([tensor[:-1], ode.tensors()[name][-1:]]) for name, tensor in coefficients.tensors().items()
    }
    signal, noise = _signal_and_noise(levels)
    return Sampler(
        timesteps=timesteps,
        coefficients=StepCoefficients(**tables, x0_clip=None),
        deterministic=ode,
        signal=signal,
        noise=noise,
        stochastic_steps=stochastic_steps,
    )


def _signal_and_noise(sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [T] fp32 of x0 and of the noise at each step, of sigmas [T + 1]."""
    return (1 - sigmas[:-1].double()).float(), sigmas[:-1].float()


def flow_coefficients(sigmas: Tensor, *, kind: str, noise_level: float = 0.0) -> StepCoefficients:
    """The T steps of a rule exactly as published, the last one with its noise.

    Args:
        sigmas: [T + 1], falling from at most 1 to 0.
        kind: flow_sde, dance_sde, cps or ode; noise_level: η.

    Returns:
        [T] fp32, made in float64. At σ = 1 flow_sde takes the next sigma for its s, as Flow-GRPO does.
    """
    levels = sigmas.double()
    sigma, following = levels[:-1], levels[1:]
    delta, ones = following - sigma, torch.ones_like(sigma)
    if kind == "cps":
        angle = noise_level * math.pi / 2
        direction = following * math.cos(angle)
        of_latents = 1 - following + direction
        of_output = -sigma * (1 - following) + direction * (1 - sigma)
        std = following * math.sin(angle)
    else:
        scale = {"ode": 0.0, "dance_sde": noise_level, "flow_sde": noise_level}[kind] * ones
        if kind == "flow_sde":
            guarded = torch.where(sigma > _ONE, following, sigma)
            scale = scale * (sigma / (1 - guarded)).sqrt()
        of_latents = 1 + scale**2 * delta / (2 * sigma)
        of_output = delta * (1 + scale**2 * (1 - sigma) / (2 * sigma))
        std = scale * (-delta).sqrt()
    values = {
        "x0_latents": ones,
        "x0_output": -sigma,
        "mean_x0": torch.zeros_like(sigma),
        "mean_latents": of_latents,
        "mean_output": of_output,
        "std": std,
    }
    return StepCoefficients(**{name: value.float() for name, value in values.items()}, x0_clip=None)


def published_cps_scale(std: Tensor) -> Tensor:
    """Factor 2·std² [T] that turns differences of our log-probs, and clip ranges on them, into Flow-CPS's.

    Flow-CPS's "log-prob" of a step is −(next − mean)², the mean over elements; ours is the Gaussian's,
    −(next − mean)²/(2·std²) − log std − log(2π)/2.
    """
    return 2 * std.square()


def scheduler_sigmas(
    scheduler: Any,
    *,
    num_inference_steps: int,
    image_tokens: int | None = None,
    linear_sigmas: bool = False,
    option: str = "sample.num_inference_steps",
) -> tuple[Tensor, Tensor]:
    """Timesteps [T] and sigmas [T + 1] as the pipelines of diffusers have their scheduler make them, fp32.

    Args:
        option: which sets num_inference_steps, for errors; the others are those of `build_flow_sampler`.

    Raises:
        ValueError: a dynamic shift without image_tokens, or sigmas that do not fall from 1 at most to 0.
    """
    template = type(scheduler).from_config(scheduler.config)
    options: dict[str, Any] = {}
    if scheduler.config.use_dynamic_shifting:
        if image_tokens is None:
            raise ValueError(
                "the model's scheduler has use_dynamic_shifting: true, a shift by the number of an image's tokens, "
                "which this model has not; set use_dynamic_shifting: false and a shift in scheduler_config.json"
            )
        options["mu"] = dynamic_shift(scheduler.config, image_tokens)
    if linear_sigmas and not scheduler.config.get("use_flow_sigmas", False):
        options["sigmas"] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    template.set_timesteps(num_inference_steps, **options)
    levels = template.sigmas
    falling = bool(levels.isfinite().all()) and bool((levels.diff() < 0).all()) and 0 < float(levels[0]) <= 1 + 1e-6
    if not falling:
        shift = f"shift {scheduler.config.shift}" if "mu" not in options else f"dynamic shift {options['mu']:.3g}"
        raise ValueError(
            f"{option} is {num_inference_steps}: with the {shift} of the model's scheduler the "
            f"sigmas do not fall from 1 to 0 but are {_shown(levels)}; use fewer steps, or "
            "another sample.shift"
        )
    return template.timesteps, levels.clamp(max=1)


def dynamic_shift(config: Any, image_tokens: int) -> float:
    """μ of a dynamic shift, linear in the number of tokens; see `calculate_shift` of diffusers' pipelines."""
    least, most = config.base_image_seq_len, config.max_image_seq_len
    slope = (config.max_shift - config.base_shift) / (most - least)
    return float(config.base_shift + slope * (image_tokens - least))


def _check_flow(scheduler: Any, kind: str, num_inference_steps: int, noise_level: float | None) -> float:
    """The noise level, after checks of the options."""
    if kind not in FLOW_SAMPLERS:
        raise ValueError(f"sample.scheduler is {kind!r}; use {', '.join(FLOW_SAMPLERS)} for a flow-matching model")
    trained_steps = scheduler.config.num_train_timesteps
    if not 2 <= num_inference_steps <= trained_steps:
        raise ValueError(
            f"sample.num_inference_steps is {num_inference_steps}; use 2 to {trained_steps} for a flow-matching model, "
            "whose last step is deterministic"
        )
    level = FLOW_SAMPLERS[kind] if noise_level is None else noise_level
    if not 0 < level < math.inf or (kind == "cps" and level > 1):
        limits = "in (0, 1]" if kind == "cps" else "above 0"
        raise ValueError(f"sample.noise_level is {level}; {kind} needs noise: use a value {limits}")
    return level


def _shown(levels: Tensor) -> str:
    first, *rest = (f"{value:.4g}" for value in levels.tolist())
    return ", ".join([first, *rest]) if len(rest) < 6 else ", ".join([first, *rest[:2], "…", *rest[-2:]])
