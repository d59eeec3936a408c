"""Step weights: how much each denoising step counts in the loss, by the name in train.step_weights."""

from __future__ import annotations

from torch import Tensor

from hrf_fast.policies.sampler import Sampler


def step_weights(name: str, sampler: Sampler) -> Tensor | None:
    """Factors [T] fp32 of the loss by step; None for equal weights.

    The gradient of a step's log-prob is z/std times that of its mean, with z standard normal: its noise grows as
    1/std². `std` takes the factor out again, with a mean of 1 over the stochastic steps, as TempFlow-GRPO weighs flow
    steps by their noise (arXiv 2508.04324).
    """
    if name == "equal":
        return None
    std = sampler.coefficients.std
    return std / std[: sampler.stochastic_steps].mean()
