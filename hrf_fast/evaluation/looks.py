"""Looks: which attributes the images of a panel have, and how many values of each are in use.

A classifier of several heads says which value of every attribute an image has. The effective number of values of an
attribute is exp of the entropy of their shares (Hill, Ecology 54, 1973): K where K values are equally common, 1 where
one is left. Left out: how attributes go together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from hrf_fast.evaluation.diversity import Interval, weighted_interval


def attribute_shares(
    log_probs: Mapping[str, Tensor], labels: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """The share of images whose most probable value is each, by attribute and value.

    Args:
        log_probs: [N, K] of every attribute; labels: its K values by name.
    """
    shares = {}
    for name, values in log_probs.items():
        counts = torch.bincount(values.argmax(1).cpu(), minlength=len(labels[name])).double() / len(values)
        shares[name] = dict(zip(labels[name], counts.tolist(), strict=True))
    return shares


def effective_number(shares: Collection[float]) -> float:
    """exp of the entropy of shares that sum to 1, in nats: how many values of an attribute are in use."""
    return float(_entropy(torch.tensor([list(shares)], dtype=torch.float64), None).exp())


def looks_interval(log_probs: Mapping[str, Tensor], *, seed: int) -> Interval:
    """The effective number of looks: the geometric mean over attributes of their effective numbers of values.

    With its 95 % bootstrap interval. It grows with N, so compare at equal N.
    """
    return weighted_interval(looks_of(log_probs), len(next(iter(log_probs.values()))), seed=seed)


def looks_of(log_probs: Mapping[str, Tensor]) -> Callable[[Tensor | None], Tensor]:
    """The effective number of looks as a function of the images' weights [R, N]; None: of all."""
    images = [_one_hot(values) for values in log_probs.values()]
    return lambda weights: torch.stack([_entropy(values, weights) for values in images]).mean(0).exp()


def _one_hot(log_probs: Tensor) -> Tensor:
    """[N, K] float64 on the CPU, 1 for the most probable value of each image."""
    return torch.nn.functional.one_hot(log_probs.argmax(1).cpu(), log_probs.shape[1]).double()


def _entropy(values: Tensor, weights: Tensor | None) -> Tensor:
    """Entropy of the shares of values [N, K]: over all images, or over each resample of weights [R, N]."""
    shares = values.mean(0) if weights is None else weights @ values
    return torch.special.entr(shares).sum(-1)
