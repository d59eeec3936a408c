"""Cases of the kernel tests: inputs for every option, their answer in float64, and the tolerances.

The answer is autograd through reference.py with every tensor in float64. The inputs are drawn so that a batch of six
has a sample in each region of the clip, far from its edges.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hrf_kernels import StepCoefficients, Surrogate, reference

TOLERANCE = {
    # of 1 + |log-prob|: four roundings to 2^-24 of a mean near 1 and of a log
    "log_prob": 5e-7,
    # of the ratio: the error of its log (log_prob's) and of one exp
    "ratio": 1e-6,
    # of the largest of the whole tensor: next - mean loses two bits of the six terms' rounding errors at std 0.15,
    # and the ratio in front of it has the error above
    "gradient": 2e-6,
    # in ulps of the half-precision gradient, on top of the line above: half of one is round to nearest
    "rounding": 0.5,
    # of 1 + |log-prob|: both backends are within log_prob of the truth, eager's dot products a bit further off
    "backends": 2e-6,
}

BACKENDS = ("triton", "eager")
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def sweep(values: Iterable[Any], kept: Container[Any], *, pairs: bool = False) -> list[Any]:
    """Parameters of which only those in `kept` run in `make test`; `make test-kernels` runs all of them."""
    rows = [(value, value if pairs else (value,)) for value in values]
    return [pytest.param(*row, marks=() if value in kept else pytest.mark.slow) for value, row in rows]


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# (log-ratio, advantage) of sample i is REGIONS[i % 6]: outside on both sides and inside, once for each sign, so that
# the clip decides in the second and the sixth; CLIP_RANGE lies far between the log-ratios
REGIONS = ((0.05, 1.5), (0.4, 0.7), (-0.4, 2.5), (-0.05, -1.5), (0.4, -0.7), (-0.4, -2.5))
CLIP_RANGE = 0.1


@dataclass(frozen=True)
class Case:
    """One input of the surrogate; the defaults are the plainest."""

    shape: tuple[int, ...] = (6, 3, 9, 11)
    prediction: str = "epsilon"
    clamp: float | None = None
    guidance: float | None = None
    kl_weight: float | None = None
    kl_per_sample: bool = False
    """The weight as [B], another number for each sample, the first of them 0."""
    per_sample: bool = False
    """Coefficients as [B], another step for each sample."""
    clips_per_sample: tuple[str, ...] = ()
    """Which of clip_range, advantage_clip and window_scale are [B], another number for each sample."""
    advantage_clip: float = math.inf
    window_scale: float = 1.0
    loss_weight: float = 1.0
    output: torch.dtype = FP32
    latents: torch.dtype = FP32


class Inputs(NamedTuple):
    """Arguments by name: the tensors that get a gradient, and the rest."""

    outputs: dict[str, Tensor]
    rest: dict[str, Any]


# one program per sample up to 8192 elements, two stages above; ragged: no multiple of a block or of 16
ONE, TWO = (6, 3, 9, 11), (6, 1, 91, 91)

# every option alone and all together
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clamp": {"clamp": 0.75},
    "guidance": {"guidance": 3.0},
    "kl": {"kl_weight": 0.3},
    "kl per sample": {"kl_weight": 0.3, "kl_per_sample": True, "loss_weight": 1 / 6},
    "coefficients per sample": {"per_sample": True},
    "clips per sample": {"clips_per_sample": ("clip_range", "advantage_clip", "window_scale"), "advantage_clip": 1.0},
    "window scale per sample": {"clips_per_sample": ("window_scale",), "advantage_clip": 1.0},
    "advantage clip": {"advantage_clip": 1.0},
    "window scale": {"window_scale": 0.6, "advantage_clip": 2.0},
    "loss weight": {"loss_weight": 1 / 6, "kl_weight": 0.3},
    "all": {
        "clamp": 0.75, "guidance": 3.0, "kl_weight": 0.3, "per_sample": True, "clips_per_sample": ("clip_range",),
        "advantage_clip": 1.0, "window_scale": 0.6, "loss_weight": 1 / 6, "kl_per_sample": True,
    },
}  # fmt: skip

PREDICTIONS = ("epsilon", "sample", "v", "dyadic")

# (model output, latents)
DTYPES = [(FP32, FP32), (BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, BF16)]

# what `make test` runs of the three above: the rest repeats a kernel in another specialisation
FEW_OPTIONS = ("plain", "kl", "all")
FEW_DTYPES = ((FP32, FP32), (BF16, FP32), (FP16, FP16))


def step_coefficients(prediction: str, alpha: float = 0.9, previous: float = 0.93) -> tuple[float, ...]:
    """The six numbers of a DDIM step at eta 1 (arXiv 2010.02502, eq. 12), from ᾱ = alpha to previous."""
    if prediction == "dyadic":
        # products with small numbers are exact, so that x0 can lie exactly on its bound in float32 and in float64
        return 2.0, -1.0, 0.5, 0.25, 0.125, 0.25
    a, b = math.sqrt(alpha), math.sqrt(1 - alpha)
    std = math.sqrt((1 - previous) / (1 - alpha) * (1 - alpha / previous))
    direction = math.sqrt(1 - previous - std**2)
    return {
        # x0 = (x - b·m)/a, mean = √previous·x0 + direction·m
        "epsilon": (1 / a, -b / a, math.sqrt(previous), 0.0, direction, std),
        # x0 = m and epsilon = (x - a·m)/b
        "sample": (0.0, 1.0, math.sqrt(previous) - direction * a / b, direction / b, 0.0, std),
        # x0 = a·x - b·m and epsilon = a·m + b·x
        "v": (a, -b, math.sqrt(previous), direction * b, direction * a, std),
    }[prediction]


def coefficients(case: Case) -> StepCoefficients:
    names = ("x0_latents", "x0_output", "mean_x0", "mean_latents", "mean_output", "std")
    if not case.per_sample:
        columns = torch.tensor(step_coefficients(case.prediction))
    else:
        # one step later for each sample
        steps = [(0.9 - 0.05 * i, 0.93 - 0.05 * i) for i in range(case.shape[0])]
        columns = torch.tensor([step_coefficients(case.prediction, *step) for step in steps]).T.contiguous()
    return StepCoefficients(**dict(zip(names, columns, strict=True)), x0_clip=case.clamp)


def draw(case: Case, seed: int = 0) -> Inputs:
    """Random inputs of a case: next latents from the policy itself, old log-probs at the ratios of REGIONS."""
    generator = torch.Generator().manual_seed(seed)

    def normal(dtype: torch.dtype) -> Tensor:
        return torch.randn(case.shape, generator=generator, dtype=torch.float64).to(dtype)

    outputs = {"model_output": normal(case.output)}
    latents = normal(case.latents)
    if case.guidance is not None:
        outputs["unconditional_output"] = normal(case.output)
    if case.prediction == "dyadic" and case.clamp is not None:
        # x0 = 2·latents - output on the upper bound, on the lower one, and an ulp (of 1) beyond
        model_output, now = outputs["model_output"].flatten(), latents.flatten()
        model_output[:3] = torch.tensor([0.0, 0.0, -(2.0**-23)])
        now[:3] = torch.tensor([0.5, -0.5, 0.5]) * case.clamp
    guided = {} if case.guidance is None else {"guidance_scale": case.guidance}
    options: dict[str, Any] = dict(guided)
    if case.kl_weight is not None:
        # not far from the policy, as a model that it was tuned from
        near = outputs["model_output"].double() + 0.1 * normal(torch.float64)
        options |= {"reference_output": near.to(case.output), "kl_weight": case.kl_weight}
    if case.kl_per_sample:
        options["kl_weight"] = case.kl_weight * torch.linspace(0, 2, case.shape[0])
    coef, batch = coefficients(case), case.shape[0]
    policy = {**outputs, "latents": latents, "coef": coef}
    exact = wide(policy)
    output = reference.guided_output(exact["model_output"], exact.get("unconditional_output"), case.guidance or 1.0)
    mean = reference.gaussian_mean(output, exact["latents"], exact["coef"])
    std = coef.std.double() if coef.std.dim() == 0 else coef.std.double().view(-1, *[1] * (latents.dim() - 1))
    next_latents = (mean + std * normal(torch.float64)).to(case.latents)
    log_prob = reference.gaussian_log_prob(**wide(policy | {"next_latents": next_latents}), **guided)
    log_ratios, advantages = torch.tensor([REGIONS[i % len(REGIONS)] for i in range(batch)]).T
    clips: dict[str, float | Tensor] = {
        "clip_range": CLIP_RANGE / case.window_scale,
        "advantage_clip": case.advantage_clip / case.window_scale,
        "window_scale": case.window_scale,
    }
    for name in case.clips_per_sample:
        clips[name] = clips[name] * torch.linspace(0.8, 1.2, batch)
    rest = {
        "latents": latents,
        "next_latents": next_latents,
        "coef": coef,
        "old_log_prob": (log_prob - log_ratios).float(),
        "advantages": advantages.contiguous(),
        **clips,
        "loss_weight": case.loss_weight,
        **options,
    }
    return Inputs(outputs, rest)


def coef_with(coef: StepCoefficients, **changes: Any) -> StepCoefficients:
    return StepCoefficients(**{**coef.tensors(), "x0_clip": coef.x0_clip, **changes})


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with every floating tensor in float64, but the clips, which are float32 by definition."""

    def convert(name: str, value: Any) -> Any:
        if isinstance(value, StepCoefficients):
            return coef_with(value, **{key: tensor.double() for key, tensor in value.tensors().items()})
        keeps = not isinstance(value, Tensor) or name in ("clip_range", "advantage_clip", "window_scale", "sample_id")
        return value if keeps else value.double()

    return {name: convert(name, value) for name, value in arguments.items()}


def differentiate(
    function: Any, inputs: Inputs, upstream: Tensor | None = None, **options: Any
) -> tuple[Surrogate, list[Tensor]]:
    """The surrogate and the gradients of Σ upstream·loss, a plain sum where upstream is None."""
    outputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.outputs.items()}
    result = function(**outputs, **inputs.rest, **options)
    total = result.loss.sum() if upstream is None else (result.loss * upstream.to(result.loss)).sum()
    gradients = torch.autograd.grad(total, list(outputs.values()))
    return Surrogate(*(value.detach() for value in result)), list(gradients)


def exact(inputs: Inputs, upstream: Tensor | None = None) -> tuple[Surrogate, list[Tensor]]:
    """The float64 answer."""
    return differentiate(reference.clipped_surrogate, Inputs(wide(inputs.outputs), wide(inputs.rest)), upstream)


def errors(found: tuple[Surrogate, list[Tensor]], true: tuple[Surrogate, list[Tensor]]) -> Iterator[tuple[str, float]]:
    """(line of TOLERANCE, error) of every number; a difference that has no tolerance is infinite."""
    (ours, gradients), (truth, expected) = found, true
    scale = 1 + truth.log_prob.abs()
    yield "log_prob", worst((ours.log_prob.double() - truth.log_prob) / scale)
    yield "ratio", worst((ours.ratio.double() / truth.ratio - 1) / scale)
    for name in ("loss", "approx_kl", "kl"):
        difference = getattr(ours, name).double() - getattr(truth, name)
        yield "ratio", worst(difference / scale / (1 + getattr(truth, name).abs()))
    for name in ("outside", "clipped"):
        yield "ratio", 0.0 if torch.equal(getattr(ours, name), getattr(truth, name)) else math.inf
    for gradient, correct in zip(gradients, expected, strict=True):
        yield from gradient_errors(gradient, correct)


def gradient_errors(gradient: Tensor, correct: Tensor) -> Iterator[tuple[str, float]]:
    error, largest = (gradient.double() - correct).abs(), correct.abs().max()
    if gradient.dtype == FP32:
        yield "gradient", worst(error / largest)
    else:
        # what float32 arithmetic may shift before the rounding is no rounding error
        beyond = (error - TOLERANCE["gradient"] * largest).clamp(min=0)
        yield "rounding", worst(beyond / ulp(correct, gradient.dtype))
    # no gradient at all where there is none: a clipped sample, an x0 outside its range
    yield "gradient", 0.0 if not bool(gradient[correct == 0].any()) else math.inf


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbours of `dtype` around float64 values, that of the smallest normal below it."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.smallest_normal)).exponent - 1
    return torch.exp2(exponent.double()) * info.eps


def worst(values: Tensor) -> float:
    """Largest magnitude; a NaN is no small error."""
    return float(torch.nan_to_num(values.detach().double().abs(), nan=math.inf).max())


def assert_within_tolerance(found: tuple[Surrogate, list[Tensor]], true: tuple[Surrogate, list[Tensor]]) -> None:
    beyond = [
        f"{name} {error:.3g} > {TOLERANCE[name]:g}" for name, error in errors(found, true) if error > TOLERANCE[name]
    ]
    assert not beyond, "; ".join(beyond)
