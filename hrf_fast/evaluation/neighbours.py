"""Neighbours: how far apart images are, and how well samples cover those of another model.

Pure functions of features in float64. Precision and recall ask whether samples lie among the reference's and the
reference among the samples' (Kynkäänniemi et al., arXiv 1904.06991); density and coverage do so less sensitively to
outliers (Naeem et al., arXiv 2002.09797). The reference must be of other noises, or be told to be of the same: samples
that share theirs would find themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEAREST = 5
"""The neighbour whose distance is a sample's radius, as Naeem et al. use it."""
EQUAL = 2 / 255
"""Root mean square difference of pixels up to which two images count as one."""


class Spread(NamedTuple):
    """Distances among images."""

    pairwise: float
    """Mean distance of two images."""
    nearest: float
    """Mean distance of an image to the nearest other one."""


class Overlap(NamedTuple):
    """Shares of samples and reference that lie among each other; density may be above 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances [N, M] of rows, in the type of `a`; 0 on the diagonal where b is a."""
    if a is b:
        matrix = torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")
        return matrix.fill_diagonal_(0)
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")


def spread(features: Tensor) -> Spread:
    """Distances among features [N, D].

    Raises:
        ValueError: fewer than two images.
    """
    rows = _rows("features", features, 2)
    return spread_of(distances(rows, rows))


def spread_of(among: Tensor) -> Spread:
    """`spread` from the distances [N, N] among images."""
    count = len(among)
    nearest = among + torch.diag(among.new_full((count,), torch.inf))
    return Spread(float(among.sum() / (count * (count - 1))), float(nearest.amin(1).mean()))


def duplicates(images: Tensor) -> float:
    """The share of images [N, 3, H, W] that an earlier image of nearly equal pixels makes superfluous."""
    return duplicates_of(nearly_equal(images))


def nearly_equal(images: Tensor) -> Tensor:
    """Which two of images [N, 3, H, W] have nearly equal pixels: [N, N] bool."""
    pixels = images.detach().to("cpu", torch.float64).flatten(1)
    return distances(pixels, pixels) <= EQUAL * pixels.shape[1] ** 0.5


def duplicates_of(near: Tensor) -> float:
    """`duplicates` from what `nearly_equal` gives."""
    return float(near.tril(-1).any(1).double().mean())


def inside(reference: Tensor, samples: Tensor, *, same_noise: bool = False) -> Tensor:
    """Which samples [M, D] lie within the radius of a sample of the reference [N, D]: [M] of 0 and 1; precision is
    their mean.

    Args:
        same_noise: sample i began from the noise of i of the reference, and is not compared with it.

    Raises:
        ValueError: no more than NEAREST of the reference.
    """
    real, fake = _rows("reference", reference, NEAREST + 1), _rows("samples", samples, 1)
    between = distances(real, fake)
    if same_noise:
        between.fill_diagonal_(float("inf"))
    return (between <= radius(distances(real, real))[:, None]).any(0).double()


def radius(among: Tensor) -> Tensor:
    """The distance [N] of each sample to its NEAREST-th neighbour, from the distances [N, N] among them."""
    # of the smallest the first is a sample's own
    return among.kthvalue(NEAREST + 1, dim=1).values


def overlap_of(radii: Tensor, fake: Tensor, between: Tensor) -> Overlap:
    """Precision, recall, density and coverage of M samples against a reference of N.

    Args:
        radii: [N] of the reference; fake: [M, M] distances among the samples; between: [N, M] to the reference.
    """
    in_real, in_fake = between <= radii[:, None], between <= radius(fake)[None, :]
    return Overlap(
        precision=float(in_real.any(0).double().mean()),
        recall=float(in_fake.any(1).double().mean()),
        density=float(in_real.double().sum() / (NEAREST * between.shape[1])),
        coverage=float((between.amin(1) <= radii).double().mean()),
    )


def _rows(name: str, features: Tensor, least: int) -> Tensor:
    if features.dim() != 2 or len(features) < least:
        raise ValueError(f"{name} have shape {list(features.shape)}; pass [N, D] of at least {least} images")
    return features.detach().to("cpu", torch.float64)
