"""Sampler, and those of DDPM's kind of models: DDIM with eta, or DDPM ancestral sampling, made in float64.

flow_sampler.py makes those of flow matching. What the affine form cannot express (dynamic thresholding, learned
variances) is refused by name. Reproduces `DDIMScheduler.step` and `DDPMScheduler.step` of diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hrf_fast.config.options import DDPM_SAMPLERS
from hrf_kernels import StepCoefficients

# the option of panels that are drawn without noise, for errors
DETERMINISTIC = "evaluation.deterministic_steps"
# under this the step is deterministic to float32: diffusers floors a DDPM variance at 1e-20
_NO_NOISE = 1e-8
# float32 holds a latent of size 1 to 6e-8: a step's noise of this std is 6 % rounding, and so are its gradients
_LEAST_STD = 1e-6


@dataclass(frozen=True)
class Sampler:
    """A sampler of T steps as tables; `step` 0 is the noisiest."""

    timesteps: Tensor
    """[T]: the scheduler's value at each step, int64; fp32 for a flow model."""
    coefficients: StepCoefficients
    """[T] fp32: the stochastic policy that is trained."""
    deterministic: StepCoefficients
    """[T] fp32: DDIM with eta = 0, or a flow's ODE, for steps that add no noise and x̂0."""
    signal: Tensor
    """[T] fp32: sqrt(ā), or 1 − σ of a flow model; the factor of x0 at each step."""
    noise: Tensor
    """[T] fp32: sqrt(1 − ā), or σ of a flow model."""
    stochastic_steps: int
    """Steps [0, stochastic_steps) have std > 0; the deterministic rest (the last step of DDIM and flows) is in no
    window."""

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def clean(self) -> StepCoefficients:
        """[T] coefficients for which `hrf_kernels.gaussian_mean` returns x̂0, the estimate of the clean image."""
        zeros = torch.zeros_like(self.deterministic.mean_x0)
        return replace(self.deterministic, mean_x0=zeros + 1, mean_latents=zeros, mean_output=zeros)

    def renoise(self, x0: Tensor, step: int, noise: Tensor) -> Tensor:
        """Forward process: x_step = signal·x0 + noise·`noise`, [B, *latent_shape]."""
        return self.signal[step] * x0 + self.noise[step] * noise

    def to(self, device: torch.device) -> Sampler:
        moved = {
            name: getattr(self, name).to(device) for name in self.__dataclass_fields__ if name != "stochastic_steps"
        }
        return Sampler(**moved, stochastic_steps=self.stochastic_steps)


def build_sampler(scheduler: Any, *, kind: str, num_inference_steps: int, eta: float) -> Sampler:
    """Tables of a sampler made from a diffusers scheduler's configuration.

    Args:
        scheduler: a DDPMScheduler, DDIMScheduler or PNDMScheduler.
        kind: "ddim", "ddpm" (ancestral, with the scheduler's fixed variance), or "ddim_trl": the previous timestep is
            clamped to 0 as in trl 0.23.1 (`scheduler_step` of modeling_sd_base.py), so that ā of the clean image is
            that of the first trained step, whatever set_alpha_to_one says.
        num_inference_steps: T.
        eta: DDIM's noise scale in (0, 1]; ancestral sampling has no eta and wants 1.

    Raises:
        ValueError: an option that the affine step cannot express, no stochastic step at all, or noise below float32's
            rounding.
    """
    _check_sampler(scheduler, kind, num_inference_steps, eta)
    template = _template(scheduler, kind, num_inference_steps)
    timesteps = template.timesteps.long()
    trained_steps, prediction = scheduler.config.num_train_timesteps, scheduler.config.prediction_type
    alphas = scheduler.alphas_cumprod.double()
    alpha = alphas[timesteps]
    final = float(alphas[0]) if kind == "ddim_trl" else _final_alpha(scheduler)
    alpha_ddim = _previous_alpha(alphas, timesteps - trained_steps // num_inference_steps, final)
    if kind != "ddpm":
        stochastic = _ddim_step(prediction, alpha, alpha_ddim, eta)
    else:
        # ancestral steps go to the next timestep of the list; the last goes to the clean image
        following = torch.cat([timesteps[1:], torch.tensor([-1])])
        alpha_next = _previous_alpha(alphas, following, 1.0)
        stochastic = _ancestral_step(template.config.variance_type, alpha, alpha_next, timesteps)
    x0_latents, x0_output = _x0_factors(prediction, alpha)
    x0 = {"x0_latents": x0_latents, "x0_output": x0_output}
    _check_signal(x0 | stochastic, prediction)
    stochastic_steps = _stochastic_steps(stochastic["std"], eta)
    stochastic["std"] = torch.where(stochastic["std"] < _NO_NOISE, 0.0, stochastic["std"])
    clip = _clip(scheduler, template)
    return Sampler(
        timesteps=timesteps,
        coefficients=_table(x0 | stochastic, clip),
        deterministic=_table(x0 | _ddim_step(prediction, alpha, alpha_ddim, 0.0), clip),
        signal=alpha.sqrt().float(),
        noise=(1 - alpha).sqrt().float(),
        stochastic_steps=stochastic_steps,
    )


def build_deterministic_sampler(scheduler: Any, *, num_inference_steps: int) -> Sampler:
    """Tables of `DDIMScheduler.step` with eta 0; arguments as `build_sampler`, and no step is stochastic.

    Raises:
        ValueError: more steps than were trained, timesteps that the scheduler can't space, or no signal at the first.
    """
    trained_steps, prediction = scheduler.config.num_train_timesteps, scheduler.config.prediction_type
    if num_inference_steps > trained_steps:
        raise ValueError(f"{DETERMINISTIC} is {num_inference_steps}; use 1 to {trained_steps}, as trained")
    template = _template(scheduler, "ddim", num_inference_steps, option=DETERMINISTIC)
    timesteps, alphas = template.timesteps.long(), scheduler.alphas_cumprod.double()
    alpha = alphas[timesteps]
    following = _previous_alpha(alphas, timesteps - trained_steps // num_inference_steps, _final_alpha(scheduler))
    x0_latents, x0_output = _x0_factors(prediction, alpha)
    values = {"x0_latents": x0_latents, "x0_output": x0_output, **_ddim_step(prediction, alpha, following, 0.0)}
    _check_signal(values, prediction)
    table = _table(values, _clip(scheduler, template))
    return Sampler(timesteps, table, table, alpha.sqrt().float(), (1 - alpha).sqrt().float(), stochastic_steps=0)


def _check_sampler(scheduler: Any, kind: str, num_inference_steps: int, eta: float) -> None:
    trained_steps = scheduler.config.num_train_timesteps
    if kind not in DDPM_SAMPLERS:
        raise ValueError(f"sample.scheduler is {kind!r}; use {', '.join(DDPM_SAMPLERS)}")
    if not 1 <= num_inference_steps <= trained_steps:
        raise ValueError(f"sample.num_inference_steps is {num_inference_steps}; use 1 to {trained_steps}, as trained")
    if not 0 < eta <= 1:
        raise ValueError(f"sample.eta is {eta}; a policy needs noise: use a value in (0, 1]")
    if kind == "ddpm" and eta != 1:
        raise ValueError(f"sample.eta is {eta} but ancestral sampling has no eta; leave it at 1 or use scheduler=ddim")
    if scheduler.config.get("thresholding", False):
        raise ValueError(
            "the model's scheduler has thresholding: true (dynamic thresholding), which depends on the whole image "
            "and has no Gaussian step of fixed coefficients; use a model or scheduler_config.json without it"
        )


def _template(scheduler: Any, kind: str, num_inference_steps: int, option: str = "sample.num_inference_steps") -> Any:
    """The diffusers scheduler whose steps are reproduced, with its T timesteps set."""
    from diffusers import DDIMScheduler, DDPMScheduler

    template = (DDPMScheduler if kind == "ddpm" else DDIMScheduler).from_config(scheduler.config)
    template.set_timesteps(num_inference_steps)
    timesteps, trained_steps = template.timesteps.long(), scheduler.config.num_train_timesteps
    if len(timesteps) != num_inference_steps or timesteps.min() < 0 or timesteps.max() >= trained_steps:
        # diffusers rounds "trailing" to one step too many for some T, and steps_offset can pass the end
        raise ValueError(
            f"{option} is {num_inference_steps}: with the scheduler's timestep_spacing "
            f"{template.config.timestep_spacing!r} its {len(timesteps)} timesteps run from {int(timesteps.max())} to "
            f"{int(timesteps.min())}; use another number of steps, such as a divisor of {trained_steps}"
        )
    return template


def _clip(scheduler: Any, template: Any) -> float | None:
    """The bound on x̂0 of a scheduler that clips."""
    return template.config.clip_sample_range if scheduler.config.get("clip_sample", False) else None


def _check_signal(coefficients: dict[str, Tensor], prediction: str) -> None:
    for name, value in coefficients.items():
        if not value.isfinite().all():
            raise ValueError(
                f"{name} is not finite: the first timestep has no signal left (rescale_betas_zero_snr), which "
                f"{prediction} prediction can't invert; use a scheduler without it, or one of v_prediction"
            )


def _stochastic_steps(std: Tensor, eta: float) -> int:
    """The number of steps before the deterministic end.

    Args:
        std: [T], before the least of it is taken for zero.
    """
    noisy = std > _NO_NOISE * eta
    count = int(noisy.sum())
    if count == 0 or not noisy[:count].all():
        raise ValueError(
            f"sample.num_inference_steps is {len(std)}: no step is stochastic before the deterministic last one, so "
            "there is no policy to sample or train; use at least 2 (--steps of hrf sample)"
        )
    check_least_std(std[:count], "sample.eta", eta)
    return count


def check_least_std(std: Tensor, option: str, value: float) -> None:
    """Refuse noise that float32 rounds away.

    Args:
        std: of the stochastic steps, proportional to the option's value.
    """
    least = float(std.min())
    if least < _LEAST_STD:
        raise ValueError(
            f"{option} is {value}, which leaves a step with noise of std {least:.1g}: float32 rounds latents by 6e-8, "
            f"so its log-probs would be rounding errors; use at least {1.06 * _LEAST_STD / least * value:.2g}"
        )


def _previous_alpha(alphas: Tensor, previous: Tensor, final: float) -> Tensor:
    """ā of the next cleaner step [T]; `final` before the first trained step."""
    return torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)


def _final_alpha(scheduler: Any) -> float:
    """ā of DDIM's clean image: 1, or that of the first trained step where set_alpha_to_one is off."""
    return 1.0 if scheduler.config.get("set_alpha_to_one", True) else float(scheduler.alphas_cumprod[0])


def _x0_factors(prediction: str, alpha: Tensor) -> tuple[Tensor, Tensor]:
    if prediction == "epsilon":
        return alpha.rsqrt(), -((1 - alpha) / alpha).sqrt()
    if prediction == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction == "v_prediction":
        return alpha.sqrt(), -(1 - alpha).sqrt()
    raise ValueError(f"the scheduler's prediction_type is {prediction!r}; use epsilon, sample or v_prediction")


def _ddim_step(prediction: str, alpha: Tensor, alpha_previous: Tensor, eta: float) -> dict[str, Tensor]:
    """Equations 12 and 16 of DDIM (arXiv 2010.02502); the direction uses the unclipped noise estimate."""
    variance = eta**2 * (1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous)
    direction = (1 - alpha_previous - variance).clamp(min=0).sqrt()
    if prediction == "epsilon":
        of_latents, of_output = torch.zeros_like(alpha), torch.ones_like(alpha)
    elif prediction == "sample":
        of_latents, of_output = (1 - alpha).rsqrt(), -(alpha / (1 - alpha)).sqrt()
    else:
        of_latents, of_output = (1 - alpha).sqrt(), alpha.sqrt()
    return {
        "mean_x0": alpha_previous.sqrt(),
        "mean_latents": direction * of_latents,
        "mean_output": direction * of_output,
        "std": variance.clamp(min=0).sqrt(),
    }


def _ancestral_step(variance_type: str, alpha: Tensor, alpha_previous: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
    """Equation 7 of DDPM (arXiv 2006.11239) with a fixed variance."""
    beta = 1 - alpha / alpha_previous
    if variance_type in ("fixed_small", "fixed_small_log"):
        variance = (1 - alpha_previous) / (1 - alpha) * beta
    elif variance_type == "fixed_large":
        variance = beta
    else:
        raise ValueError(
            f"the scheduler's variance_type is {variance_type!r}; ancestral sampling here needs fixed_small, "
            "fixed_small_log or fixed_large; sample.scheduler=ddim works with any"
        )
    return {
        "mean_x0": alpha_previous.sqrt() * beta / (1 - alpha),
        "mean_latents": (alpha / alpha_previous).sqrt() * (1 - alpha_previous) / (1 - alpha),
        "mean_output": torch.zeros_like(alpha),
        "std": torch.where(timesteps > 0, variance.sqrt(), 0.0),
    }


def _table(values: dict[str, Tensor], clip: float | None) -> StepCoefficients:
    return StepCoefficients(**{name: value.float() for name, value in values.items()}, x0_clip=clip)
