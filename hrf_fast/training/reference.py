"""Reference: how strongly the loss holds the policy to the pretrained model, and at which steps.

Two terms for the loss of a step, both from the pretrained model's mean at the same latents: the KL, which is
mean((μ − μ_ref)²)/(2·std²) for two Gaussians of equal std (DPOK, arXiv 2305.16381); and mean((μ − μ_ref)²) itself on
the first, noisy steps only, where most of the diversity is lost (DiverseGRPO, arXiv 2512.21514).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hrf_fast.config.remedy_options import RemediesConfig


@dataclass(frozen=True)
class ReferenceWeights:
    """Weights of both terms in one iteration; by default there is neither."""

    kl: float = 0.0
    mean: float = 0.0
    mean_steps: int = 0
    """The term of the means is of steps before this one."""

    @property
    def steps(self) -> int:
        """The steps before this one have a term, and need the pretrained model's output."""
        if self.kl:
            return sys.maxsize
        return self.mean_steps if self.mean else 0

    def per_row(self, steps: int | Tensor, std: Tensor, rows: int) -> float | Tensor:
        """The kernels' weight of the KL, a number or [rows]: 2·std² takes its 1/(2·std²) away again.

        Args:
            steps: one step or one per row; std: of it, a scalar or [rows].
        """
        if not self.mean or (isinstance(steps, int) and steps >= self.mean_steps):
            return self.kl
        weights = self.kl + self.mean * 2 * std.square() * (steps < self.mean_steps)
        return weights.expand(rows)


NO_REFERENCE = ReferenceWeights()


def reference_at(
    remedies: RemediesConfig, *, num_inference_steps: int, iterations: int
) -> Callable[[int], ReferenceWeights]:
    """The weights by iteration, that of the KL linear from the first of `iterations` to the last."""
    start, end = remedies.kl_weight, remedies.kl_weight_end
    change = 0.0 if end is None else (end - start) / max(1, iterations - 1)
    steps = remedies.penalised_steps(num_inference_steps)
    return lambda iteration: ReferenceWeights(start + change * iteration, remedies.reference_penalty, steps)
