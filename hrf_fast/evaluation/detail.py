"""Detail: what `hrf evaluate` says of a model's images beyond its panel, against the pretrained model's own samples.

Intervals are of random halves: a bootstrap draws images twice, and the metrics here count different images
(`evaluation.kept` has the reasoning and its sources).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hrf_fast.evaluation.diversity import Interval
from hrf_fast.evaluation.fidelity import fid, kid
from hrf_fast.evaluation.neighbours import (
    NEAREST,
    Overlap,
    Spread,
    distances,
    duplicates_of,
    nearly_equal,
    overlap_of,
    radius,
    spread_of,
)
from hrf_fast.evaluation.vendi import median_distance, vendi_score

DRAWS = 100
"""Halves of each metric."""
ORDERS = {"vendi_q0.5": 0.5, "vendi_q2": 2.0, "vendi_qinf": math.inf}
LEAST = 2 * (NEAREST + 1)
"""Fewest images, so that a half of them has a NEAREST-th neighbour."""
RBF_MOST = 2000
"""Images whose RBF kernel is computed, which takes the cube of their number, and whose distances are its bandwidth."""


def half_intervals(statistic: Callable[[Tensor], Sequence[float]], count: int, *, seed: int) -> list[Interval]:
    """Statistics of an index into `count` samples, each with the spread over random halves of them around its value.

    The value is inside: halves of few samples may all lie on one side of their mean.

    Raises:
        ValueError: fewer samples than LEAST.
    """
    if count < LEAST:
        raise ValueError(f"evaluation.panel_size is {count}; these metrics need at least {LEAST} images")
    generator, size = torch.Generator().manual_seed(seed), count // 2
    index = [torch.randperm(count, generator=generator)[:size] for _ in range(DRAWS)]
    drawn = torch.tensor([list(statistic(half)) for half in index], dtype=torch.float64)
    deviations = (drawn - drawn.mean(0)) * math.sqrt(size / (count - size))
    low, high = deviations.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).tolist()
    values = statistic(torch.arange(count))
    return [
        Interval(value, value + min(down, 0.0), value + max(up, 0.0))
        for value, down, up in zip(values, low, high, strict=True)
    ]


def share_interval(interval: Interval, count: int) -> Interval:
    """The interval of a share of `count` images: within [0, 1], and Wilson's (1927) where all halves say the same.

    As where all or none are counted: random halves have no spread there.
    """
    value, low, high = interval
    if value in (0.0, 1.0) or low == high:
        # z² of 95 %
        z2 = 1.959964**2
        centre, reach = value + z2 / (2 * count), math.sqrt(z2 * (value * (1 - value) + z2 / (4 * count)) / count)
        return Interval(value, *((centre + sign * reach) / (1 + z2 / count) for sign in (-1, 1)))
    return Interval(value, max(0.0, low), min(1.0, high))


def detail(
    features: Tensor, images: Tensor, reference: Tensor, *, seed: int, fidelity: bool = True
) -> dict[str, list[float]]:
    """All metrics by name, each [value, low, high]; FID and KID, which no half can give, are [value].

    Args:
        features: [N, D] of images [N, 3, H, W]; reference: [M, D] of the pretrained model's, of other noises.
        seed: of the halves; fidelity: whether FID and KID are among them.

    Raises:
        ValueError: fewer images than LEAST.
        ImportError: torchmetrics is not installed.
    """
    rows, other = (part.detach().to("cpu", torch.float64) for part in (features, reference))
    radii, among, between = radius(distances(other, other)), distances(rows, rows), distances(other, rows)
    orders = half_intervals(lambda i: [vendi_score(rows[i], order=q) for q in ORDERS.values()], len(rows), seed=seed)
    overlaps = half_intervals(lambda i: overlap_of(radii, among[i][:, i], between[:, i]), len(rows), seed=seed)
    near, bandwidth = nearly_equal(images), median_distance(other[:RBF_MOST])
    (rbf,) = half_intervals(
        lambda i: [vendi_score(rows[i], kernel="rbf", bandwidth=bandwidth)], len(rows[:RBF_MOST]), seed=seed
    )
    apart = half_intervals(lambda i: spread_of(among[i][:, i]), len(rows), seed=seed)
    (equal,) = half_intervals(lambda i: [duplicates_of(near[i][:, i])], len(rows), seed=seed)
    # of the images, and of the reference's; a density is no share
    counts = {"precision": len(rows), "recall": len(other), "coverage": len(other)}
    return {
        **{name: list(interval) for name, interval in zip(ORDERS, orders, strict=True)},
        "vendi_rbf": list(rbf),
        **{f"{name}_distance": list(interval) for name, interval in zip(Spread._fields, apart, strict=True)},
        "duplicates": list(share_interval(equal, len(rows))),
        **{
            name: list(share_interval(interval, counts[name]) if name in counts else interval)
            for name, interval in zip(Overlap._fields, overlaps, strict=True)
        },
        **({"fid": [fid(other, rows)], "kid": [kid(other, rows, seed=seed)]} if fidelity else {}),
    }
