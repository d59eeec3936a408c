"""The clipped loss of one denoising step and its gradient, by everything that can compute it, on the same numbers.

Epsilon prediction without guidance: what every provider can do. The baselines compute the loss alone; ours also its
statistics, which are [B]. Left out: timing (timing.py), counting (counting.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

import hrf_kernels
from benchmarks.kernel_bench.counting import Traffic
from hrf_kernels import StepCoefficients, eager, reference
from hrf_kernels.coefficients import ClipInputs, StepInputs
from hrf_kernels.launch import ONE_PROGRAM_LIMIT

CLIP_RANGE = 0.1
X0_CLIP = 1.0


class Result(NamedTuple):
    """loss and log_prob [B]; gradient of the summed loss, like the model output."""

    loss: Tensor
    log_prob: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Case:
    """One step of a batch; its coefficients are scalars, as in a rollout."""

    model_output: Tensor
    latents: Tensor
    next_latents: Tensor
    coef: StepCoefficients
    old_log_prob: Tensor
    advantages: Tensor

    @cached_property
    def leaf(self) -> Tensor:
        """The model output as autograd wants it."""
        return self.model_output.clone().requires_grad_()

    @cached_property
    def ones(self) -> Tensor:
        """[B]: gradient of a sum of losses, and by how much a number per sample is scaled."""
        return torch.ones_like(self.advantages)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are read and of the gradient that is written."""
        return 2 * self.model_output.nbytes + self.latents.nbytes + self.next_latents.nbytes

    def copies(self, count: int) -> list[Case]:
        """This case and `count` − 1 equal ones, whose samples have memory of their own."""
        names = ("model_output", "latents", "next_latents")
        return [self, *(replace(self, **{n: getattr(self, n).clone() for n in names}) for _ in range(count - 1))]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """After the model output, in the order of `clipped_surrogate`, without its clip range."""
        return self.latents, self.next_latents, self.coef, self.old_log_prob, self.advantages


def make_case(
    shape: tuple[int, ...], batch: int, *, clamp: bool, dtype: torch.dtype, device: torch.device | str, seed: int
) -> Case:
    """A step of DDIM (eta 1) in mid-course; a part of x0 is beyond its clamp and some ratios are beyond their range."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    now, after = 0.40, 0.45
    variance = (1 - after) / (1 - now) * (1 - now / after)
    numbers = (1 / math.sqrt(now), -math.sqrt(1 - now) / math.sqrt(now), math.sqrt(after), 0.0)
    numbers += (math.sqrt(1 - after - variance), math.sqrt(variance))
    coef = StepCoefficients(*torch.tensor(numbers), x0_clip=X0_CLIP if clamp else None)
    noise = normal(batch, *shape)
    latents = math.sqrt(now) * normal(batch, *shape).clamp(-1, 1) + math.sqrt(1 - now) * noise
    output = (noise + 0.2 * normal(batch, *shape)).to(dtype)
    mean = reference.gaussian_mean(output, latents, coef)
    following = mean + coef.std * normal(batch, *shape)
    old = reference.gaussian_log_prob(output, latents, following, coef) + CLIP_RANGE * normal(batch)
    tensors = (value.to(device) for value in (output, latents, following))
    return Case(*tensors, coef.to(device), old.to(device), normal(batch).to(device))


def exact(case: Case) -> Result:
    """The literal formula in float64: what every provider is held to."""
    wide = Case(
        *(value.double() for value in (case.model_output, case.latents, case.next_latents)),
        StepCoefficients(*(v.double() for v in case.coef.tensors().values()), x0_clip=case.coef.x0_clip),
        case.old_log_prob.double(),
        case.advantages.double(),
    )
    return literal(wide)


def literal(case: Case) -> Result:
    """The formula as it is written, by autograd: what trainers do today."""
    # tensors, which need no copy to a GPU at every step
    clips = {"clip_range": CLIP_RANGE * case.ones, "advantage_clip": math.inf * case.ones}
    surrogate = reference.clipped_surrogate(case.leaf, *case.arguments, **clips)
    return Result(surrogate.loss, surrogate.log_prob, _gradient(surrogate.loss, case))


def folded_loss(
    model_output: Tensor, latents: Tensor, next_latents: Tensor, coef: list[Tensor], x0_clip: float | None,
    old_log_prob: Tensor, advantages: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, log_prob): the strongest eager form that we know, with mean_latents = 0 as epsilon prediction has it.

    The two products of each input are one, next − mean is two fused multiply-adds, its square is never stored.
    """
    x0_latents, x0_output, mean_x0, _, mean_output, std = coef
    output, size = model_output.float(), latents[0].numel()
    if x0_clip is None:
        difference = torch.addcmul(next_latents, latents, -mean_x0 * x0_latents)
        difference = torch.addcmul(difference, output, -mean_x0 * x0_output - mean_output)
    else:
        x0 = torch.addcmul(latents * x0_latents, output, x0_output)
        difference = torch.addcmul(next_latents, torch.nn.functional.hardtanh(x0, -x0_clip, x0_clip), -mean_x0)
        difference = torch.addcmul(difference, output, -mean_output)
    norm = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    log_prob = -0.5 * norm.square() / (size * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)
    ratio = (log_prob - old_log_prob).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE))
    return loss, log_prob


def folded(case: Case, loss_of: Callable[..., tuple[Tensor, Tensor]] = folded_loss) -> Result:
    coef = list(case.coef.tensors().values())
    inputs = (case.leaf, case.latents, case.next_latents, coef, case.coef.x0_clip, case.old_log_prob, case.advantages)
    loss, log_prob = loss_of(*inputs)
    return Result(loss, log_prob.detach(), _gradient(loss, case))


def compiled() -> Callable[[Case], Result]:
    """`folded`, compiled for one case: a new function each time, so that no limit on recompiling is met."""
    torch._dynamo.reset()
    loss_of = torch.compile(folded_loss, fullgraph=True, dynamic=False)
    return lambda case: folded(case, loss_of)


def compile_fails(device: torch.device) -> str | None:
    """Why torch.compile can't be a provider here; None if it can."""
    if device.type == "cuda":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return "no C++ compiler; install g++ or name one in CXX"
    return None


def analytic(case: Case) -> Result:
    """Ours, in plain torch, through the public function."""
    if isinstance(_get_current_dispatch_mode(), Traffic):
        # a counter takes a custom operation for one call, whatever its body moves
        return implementation(case, eager)
    surrogate = hrf_kernels.clipped_surrogate(case.leaf, *case.arguments, CLIP_RANGE, backend="eager")
    return Result(surrogate.loss, surrogate.log_prob, _gradient(surrogate.loss, case))


def implementation(case: Case, module: ModuleType, **plan: bool) -> Result:
    """Ours in `module`, eager or fused, past its custom operation: the calls of a forward and a backward."""
    inputs = StepInputs(case.model_output, case.latents, case.coef, next_latents=case.next_latents)
    clips = ClipInputs(case.old_log_prob, case.advantages, CLIP_RANGE, math.inf, loss_weight=1.0, kl_weight=0.0)
    results, gradients = module.clipped_surrogate(inputs, clips, with_gradient=True, **plan)
    if gradients:
        module.scale_gradients(gradients, case.ones)
    else:
        gradients = module.output_gradients(inputs, case.ones, results["slope"], 0.0)
    return Result(results["loss"], results["log_prob"], gradients[0])


def triton(case: Case, *, one_program: bool) -> Result:
    """Ours, fused, by either plan."""
    from hrf_kernels import fused

    return implementation(case, fused, one_program=one_program)


def _gradient(loss: Tensor, case: Case) -> Tensor:
    return torch.autograd.grad(loss.sum(), case.leaf)[0]


# the order of every table
NAMES = ("literal eager", "folded eager", "torch.compile", "analytic", "two-stage", "one-program")


def providers(names: tuple[str, ...], shape: tuple[int, ...]) -> dict[str, Callable[[Case], Result]]:
    """The providers of `names` that can run a sample of `shape`; torch.compile's compiles at its first call."""
    made: dict[str, Callable[[Case], Result]] = {
        "literal eager": literal,
        "folded eager": folded,
        "analytic": analytic,
        "two-stage": lambda case: triton(case, one_program=False),
    }
    if "torch.compile" in names:
        made["torch.compile"] = compiled()
    if math.prod(shape) <= ONE_PROGRAM_LIMIT:
        made["one-program"] = lambda case: triton(case, one_program=True)
    return {name: made[name] for name in NAMES if name in names and name in made}


class Disagreement(ValueError):
    """A provider's numbers are not the reference's, so that its speed means nothing."""


# what a provider may be off by: log_prob by (1 + |log_prob|), loss by its largest, a gradient by its largest. Ours as
# promised; the baselines in float32 lose more, folding by 4x, and are not to be called wrong for that
TOLERANCES = {"ours": (5e-7, 2e-6, 2e-6), "baseline": (5e-6, 1e-5, 1e-5)}
# a bf16 gradient is rounded to 8 bits: half an ulp of the largest
BF16_ROUNDING = 2**-8


def check(name: str, result: Result, truth: Result) -> dict[str, float]:
    """Largest errors of log_prob, loss and gradient.

    Raises:
        Disagreement: one is beyond its tolerance or not a number.
    """
    errors = {
        "log_prob": ((result.log_prob - truth.log_prob).abs() / (1 + truth.log_prob.abs())).max().item(),
        "loss": ((result.loss - truth.loss).abs().max() / truth.loss.abs().max()).item(),
        "gradient": ((result.gradient - truth.gradient).abs().max() / truth.gradient.abs().max()).item(),
    }
    limits = TOLERANCES["ours" if name in ("analytic", "two-stage", "one-program") else "baseline"]
    for (what, error), limit in zip(errors.items(), limits, strict=True):
        if what == "gradient" and result.gradient.dtype == torch.bfloat16:
            limit = BF16_ROUNDING
        if not error <= limit:
            raise Disagreement(f"{name}: {what} is off by {error:.3g} of its scale; at most {limit:g} is right")
    return errors
