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

from hrf_fast.evaluation.vendi import distances

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


def spread(features: Tensor) -> Spread:
    """Distances among features [N, D].

    Raises:
        ValueError: fewer than two images.
    """
    rows = _rows("features", features, 2)
    between = distances(rows, rows)
    pairwise = between.sum() / (len(rows) * (len(rows) - 1))
    return Spread(float(pairwise), float(between.fill_diagonal_(torch.inf).amin(1).mean()))


def duplicates(images: Tensor, *, tolerance: float = EQUAL) -> float:
    """The share of images [N, 3, H, W] that an earlier image of nearly equal pixels makes superfluous.

    Args:
        tolerance: root mean square difference up to which images count as equal.
    """
    pixels = images.detach().to("cpu", torch.float64).flatten(1)
    near = distances(pixels, pixels) <= tolerance * pixels.shape[1] ** 0.5
    return float(near.tril(-1).any(1).double().mean())


def overlap(reference: Tensor, samples: Tensor, *, nearest: int = NEAREST) -> Overlap:
    """Precision, recall, density and coverage of samples [M, D] against a reference [N, D].

    Args:
        nearest: k; the radius around a sample is its distance to the k-th nearest of its own kind.

    Raises:
        ValueError: no more than k of either.
    """
    real, fake = _rows("reference", reference, nearest + 1), _rows("samples", samples, nearest + 1)
    radii = radius(distances(real, real), nearest)
    return overlap_of(radii, distances(fake, fake), distances(real, fake), nearest=nearest)


def inside(reference: Tensor, samples: Tensor, *, nearest: int = NEAREST, same_noise: bool = False) -> Tensor:
    """Which samples [M, D] lie within the radius of a sample of the reference [N, D]: [M] of 0 and 1; precision is
    their mean.

    Args:
        same_noise: sample i began from the noise of i of the reference, and is not compared with it.

    Raises:
        ValueError: no more than k of the reference.
    """
    real, fake = _rows("reference", reference, nearest + 1), _rows("samples", samples, 1)
    between = distances(real, fake)
    if same_noise:
        between.fill_diagonal_(float("inf"))
    return (between <= radius(distances(real, real), nearest)[:, None]).any(0).double()


def radius(among: Tensor, nearest: int = NEAREST) -> Tensor:
    """The distance [N] of each sample to its k-th nearest, from the distances [N, N] among them."""
    # of the smallest the first is a sample's own
    return among.kthvalue(nearest + 1, dim=1).values


def overlap_of(radii: Tensor, fake: Tensor, between: Tensor, *, nearest: int = NEAREST) -> Overlap:
    """`overlap` from the reference's radii [N], the samples' distances [M, M] and those between them [N, M]."""
    in_real, in_fake = between <= radii[:, None], between <= radius(fake, nearest)[None, :]
    return Overlap(
        precision=float(in_real.any(0).double().mean()),
        recall=float(in_fake.any(1).double().mean()),
        density=float(in_real.double().sum() / (nearest * between.shape[1])),
        coverage=float((between.amin(1) <= radii).double().mean()),
    )


def _rows(name: str, features: Tensor, least: int) -> Tensor:
    if features.dim() != 2 or len(features) < least:
        raise ValueError(f"{name} have shape {list(features.shape)}; pass [N, D] of at least {least} images")
    return features.detach().to("cpu", torch.float64)
