"""Mixtures of Gaussians in the plane, rewards over it, and the count of modes that samples still reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXTENT = 2.0
"""Points in [-EXTENT, EXTENT] are images; what lies outside is clamped to the edge."""
# a point reaches a mode within this distance of it or of its peak
_REACH = 0.35
# a mode is kept if it has at least this share of the samples that it had before
_KEPT = 0.25


@dataclass(frozen=True)
class Toy:
    """A mixture to pretrain on, and a reward with a peak on each of its modes."""

    name: str
    centres: Tensor
    """[M, 2]."""
    weights: Tensor
    """[M] of the mixture, of sum 1."""
    heights: Tensor
    """[M] of the reward's peaks."""
    outward: float = 1.25
    """Distance from the origin of a peak over that of its mode: what every mode can gain by itself."""
    width: float = 0.08
    """Standard deviation of every mode."""
    peak: float = 0.25
    """Standard deviation of the reward's peaks."""

    @property
    def good(self) -> Tensor:
        """Index of the modes with the highest peaks: those that are to be kept."""
        return (self.heights == self.heights.max()).nonzero().flatten()

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Points [count, 2] of the mixture."""
        mode = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return self.centres[mode] + self.width * torch.randn(count, 2, generator=generator)

    def expected_noise(self, points: Tensor, alpha: Tensor) -> Tensor:
        """Mean noise [B, 2] in noised points [B, 2] whose share of signal is `alpha` [B, 1]: Tweedie's formula."""
        variance = alpha * self.width**2 + 1 - alpha
        away = points[:, None] - alpha.sqrt()[:, :, None] * self.centres
        logits = self.weights.log() - away.square().sum(-1) / (2 * variance)
        return (1 - alpha).sqrt() / variance * (logits.softmax(1)[..., None] * away).sum(1)

    def reward(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Height of the highest peak at each point [B], by a Gaussian around each mode."""
        squares = (points_of(images)[:, None] - self.outward * self.centres).square().sum(-1)
        return (self.heights * (-squares / (2 * self.peak**2)).exp()).amax(1)

    def shares(self, points: Tensor) -> Tensor:
        """Share [M] of the points [N, 2] that reach each mode; the rest lies between them."""
        distance = torch.minimum(torch.cdist(points, self.centres), torch.cdist(points, self.outward * self.centres))
        distance, mode = distance.min(1)
        return torch.bincount(mode[distance < _REACH], minlength=len(self.centres)) / len(points)


def modes_kept(before: Tensor, after: Tensor) -> int:
    """How many modes have at least a quarter of the samples that they had; shares [M] before and after."""
    return int((after >= _KEPT * before).sum())


def effective_modes(shares: Tensor) -> float:
    """exp of the entropy of the modes' shares [M], 0 where no sample reaches any."""
    if not (total := shares.sum()):
        return 0.0
    return float(torch.distributions.Categorical(probs=shares / total).entropy().exp())


def images_of(points: Tensor) -> Tensor:
    """Images [B, 3, 1, 1] in [0, 1] of points [B, 2]: the coordinates are red and green."""
    colours = torch.nn.functional.pad(points, (0, 1)) / (2 * EXTENT) + 0.5
    return colours.clamp(0, 1)[:, :, None, None]


def points_of(images: Tensor) -> Tensor:
    """Points [B, 2] of what `images_of` made."""
    return (images[:, :2, 0, 0] - 0.5) * (2 * EXTENT)


def _ring(count: int) -> Tensor:
    angles = [math.pi / 2 + 2 * math.pi * k / count for k in range(count)]
    return torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles])


def equal_modes() -> Toy:
    """Five equal modes on a circle with equal rewards, as in Uni-TMPO's toy (arXiv 2605.10983): none need be lost."""
    return Toy("equal", _ring(5), torch.full((5,), 0.2), torch.ones(5))


def unequal_modes() -> Toy:
    """Eight modes on a circle, every second of half the reward, and a good one in the centre of a tenth of the weight.

    After GARDO's toy (arXiv 2512.24138, figure 3), whose rare central mode is what only some methods keep.
    """
    centres = torch.cat([_ring(8), torch.zeros(1, 2)])
    weights = torch.tensor([1.0] * 8 + [0.1])
    heights = torch.tensor([1.0, 0.5] * 4 + [1.0])
    return Toy("unequal", centres, weights / weights.sum(), heights)


TOYS = {toy.name: toy for toy in (equal_modes(), unequal_modes())}
