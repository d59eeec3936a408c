"""Step weights: how much each denoising step counts in the loss, and how far its ratio may go, by names of options."""

from __future__ import annotations

import torch
from torch import Tensor

from hrf_fast.policies.flow_sampler import published_cps_scale
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


def range_factors(name: str, sampler: Sampler) -> Tensor | None:
    """Factors [T] fp32 of train.clip_range by step, by the name in train.clip_steps; None for equal ranges.

    A range ±ε of a ratio whose logarithm is c times ours is one of ±ε/c, to first order in ε. c is std in GRPO-Guard
    (arXiv 2510.22319), whose shift of the log-ratio is left out, and 2·std² in Flow-CPS (arXiv 2509.05952).
    """
    if name == "equal":
        return None
    std = sampler.coefficients.std
    scale = std if name == "std" else published_cps_scale(std)
    # a deterministic step has no ratio
    return torch.where(std > 0, 1 / scale, 1.0)
