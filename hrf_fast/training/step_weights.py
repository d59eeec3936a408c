"""Step weights: how much each denoising step counts in the loss, by the name in train.step_weights."""

from __future__ import annotations

import torch
from torch import Tensor

from hrf_fast.policies.sampler import Sampler


def step_weights(name: str, sampler: Sampler) -> Tensor | None:
    """Factors [T] fp32 of the loss by step; None for equal weights.

    The gradient of a step's log-prob is z/std times that of its mean, with z standard normal: its noise grows as
    1/std². `std` takes the factor out again, as TempFlow-GRPO weighs flow steps by their noise (arXiv 2508.04324). With
    Δ the fall of sigma in a flow's step, `guard` is std/Δ, what GRPO-Guard (arXiv 2510.22319) makes of a gradient: its
    log-ratios are multiplied by std and its loss is divided by Δ. `dt` is Δ, as in PCPO (arXiv 2509.25774). All have a
    mean of 1 over the stochastic steps.

    Raises:
        ValueError: guard or dt of a model that is none of flow matching.
    """
    if name == "equal":
        return None
    weights = sampler.coefficients.std
    if name != "std":
        if not sampler.timesteps.is_floating_point():
            raise ValueError(
                f"train.step_weights is {name}, which weighs by a flow's sigmas, but the model is none of flow "
                "matching; use std or equal"
            )
        fall = -torch.cat([sampler.noise, sampler.noise.new_zeros(1)]).diff()
        weights = fall if name == "dt" else weights / fall
    return weights / weights[: sampler.stochastic_steps].mean()
