"""Fidelity: FID and KID between two sets of features, by torchmetrics.

FID compares means and covariances (Heusel et al., arXiv 1706.08500) and is biased upwards for few samples, so compare
at equal numbers. KID is the squared MMD of a cubic kernel (Binkowski et al., arXiv 1801.01401), unbiased. The features
are those of `evaluation.network`; the papers' numbers are of an Inception network that transformers does not have.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

KID_SUBSETS = 100


class _Given(nn.Identity):
    """Features in place of images: torchmetrics' own network is not asked."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width


def fid(reference: Tensor, samples: Tensor) -> float:
    """Fréchet distance of features [N, D] and [M, D].

    Raises:
        ImportError: torchmetrics is not installed; ValueError: fewer than two of either.
    """
    _check(reference, samples, 2)
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise _missing(error) from error
    metric = FrechetInceptionDistance(feature=_Given(reference.shape[1]))
    return float(_compute(metric, reference, samples))


def kid(reference: Tensor, samples: Tensor, *, seed: int) -> float:
    """Mean of the squared MMD over random subsets of half of the samples.

    Raises:
        ImportError: torchmetrics is not installed; ValueError: fewer than four of either.
    """
    _check(reference, samples, 4)
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise _missing(error) from error
    size = min(len(reference), len(samples)) // 2
    options: dict[str, Any] = {"subsets": KID_SUBSETS, "subset_size": size}
    with warnings.catch_warnings():
        # the constructor warns of the memory for features, which are in memory already
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
        metric = KernelInceptionDistance(feature=_Given(reference.shape[1]), **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, _ = _compute(metric, reference, samples)
    return float(mean)


def _compute(metric: Any, reference: Tensor, samples: Tensor) -> Any:
    metric.set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(samples.double(), real=False)
    return metric.compute()


def _check(reference: Tensor, samples: Tensor, least: int) -> None:
    if min(len(reference), len(samples)) < least:
        raise ValueError(
            f"{len(reference)} reference images and {len(samples)} samples are given; this needs {least} of each"
        )


def _missing(error: ImportError) -> ImportError:
    return ImportError(f'FID and KID need torchmetrics ({error}): pip install "hrf_fast[metrics]"')
