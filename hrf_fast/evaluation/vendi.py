"""The Vendi Score of any order and of two kernels, for thousands of images.

exp of the Rényi entropy of order q of the eigenvalues λ of K/N (Friedman and Dieng, arXiv 2210.02410; orders: Pasarkar
and Dieng, arXiv 2310.12952): an effective number of images. A small order counts rare images more, a large one less;
infinity is 1/max λ. Panels have the order 1, exp(−Σ λ log λ), and the cosine kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hrf_fast.evaluation.neighbours import distances

KERNELS = ("cosine", "rbf")
CHUNK = 64
"""Resamples whose kernel matrices are in memory at a time."""


def vendi_score(
    features: Tensor, *, kernel: str = "cosine", order: float = 1.0, bandwidth: float | None = None
) -> float:
    """The Vendi Score of features [N, D] of any floating type: N equal images give 1, N orthogonal ones N.

    It grows with N, so compare at equal N; and it is only as good as the features: on raw pixels noise comes out far
    above photographs. The eigenvalues of the cosine kernel are those of a [D, D] matrix where D < N: 10,000 images of
    128 features take a tenth of a second. The RBF kernel has N of its own, in N² memory and N³ time; its order 2 needs
    none.

    Args:
        kernel: cosine, or rbf, exp(−‖a − b‖²/(2·bandwidth²)).
        order: above 0, inf too; bandwidth: of rbf; compare at equal bandwidths, such as `median_distance` of one model.

    Raises:
        ValueError: another kernel, an order or bandwidth that is not above 0, rbf without a bandwidth or cosine with
            one; or features that are not [N, D] with N > 0, or have a row of zeros or a value that is not finite.
    """
    if kernel not in KERNELS or not order > 0:
        raise ValueError(f"kernel is {kernel!r} and order is {order}; use one of {', '.join(KERNELS)}, and above 0")
    if (kernel == "rbf") != (bandwidth is not None) or (bandwidth is not None and not bandwidth > 0):
        raise ValueError(f"bandwidth is {bandwidth} with kernel {kernel!r}; rbf needs one above 0, cosine has none")
    if bandwidth is None:
        gram = _gram_of(_unit_rows(features))(None)
    else:
        rows = features.detach().to("cpu", torch.float64)
        gram = distances(rows, rows).square_().div_(-2 * bandwidth**2).exp_().div_(len(rows))
    if order == 2:
        # the sum of squared eigenvalues is the squared Frobenius norm
        return float(1 / gram.square().sum())
    eigenvalues = torch.linalg.eigvalsh(gram)
    return float(_of_order_1(eigenvalues)) if order == 1 else _of_order(eigenvalues, order)


def vendi_of(features: Tensor) -> Callable[[Tensor | None], Tensor]:
    """The Vendi Score of a panel's features [N, D] as a function of their weights [R, N]; None: of all."""
    gram_of = _gram_of(_unit_rows(features))
    return lambda weights: _of_order_1(torch.linalg.eigvalsh(gram_of(weights)))


def affordable(resamples: int, features: Tensor) -> int:
    """How many of `resamples` Vendi Scores of features [N, D] to make: one takes the cube of the smaller of N and D.

    All where that is at most 256, fewer beyond, so that together they take no longer, but 100.
    """
    return min(resamples, max(100, round(resamples * (256 / min(features.shape)) ** 3)))


def chunk_of(features: Tensor) -> int:
    """Resamples of features [N, D] whose kernel matrices are in memory at a time: 32 MiB where they are several."""
    return max(1, min(CHUNK, 2**22 // min(features.shape) ** 2))


def median_distance(features: Tensor) -> float:
    """The median distance between two rows: the usual bandwidth (Garreau et al., 1707.07269).

    Raises:
        ValueError: fewer than two rows, or all of them equal.
    """
    rows = features.detach().to("cpu", torch.float64)
    if len(rows) < 2:
        raise ValueError(f"features have shape {list(features.shape)}; a distance needs two rows")
    median = float(torch.pdist(rows).median())
    if not median > 0:
        raise ValueError("the median distance between features is 0: more than half of the pairs are equal")
    return median


def _unit_rows(features: Tensor) -> Tensor:
    features = features.detach().to("cpu", torch.float64)
    if features.dim() != 2 or not len(features):
        raise ValueError(f"features have shape {list(features.shape)}; pass [N, D] with N > 0")
    norm = features.norm(dim=1, keepdim=True)
    bad = ~(norm.isfinite() & (norm > 0)).flatten()
    if bad.any():
        first = int(bad.int().argmax())
        raise ValueError(f"{int(bad.sum())} of {len(bad)} features are all zeros or not finite, row {first} first")
    return features / norm


def _gram_of(unit: Tensor) -> Callable[[Tensor | None], Tensor]:
    """The cosine kernel of unit rows [N, D] over N as a function of weights [R, N]; None: of all.

    It is [N, N], or [D, D] where D is smaller: both have the same eigenvalues but for zeros, which add nothing to an
    entropy.
    """
    count, width = unit.shape
    equal = torch.full((count,), 1 / count, dtype=torch.float64)
    if width < count:
        # one for all resamples: fresh memory of this size costs more than the product
        rows = torch.empty_like(unit)

        def gram(weights: Tensor) -> Tensor:
            torch.mul(unit, weights.sqrt()[:, None], out=rows)
            return rows.mT @ rows

        return lambda weights: gram(equal) if weights is None else torch.stack([gram(row) for row in weights])
    kernel = unit @ unit.mT

    def scaled(weights: Tensor | None) -> Tensor:
        roots = (equal if weights is None else weights).sqrt()
        return kernel * roots[..., :, None] * roots[..., None, :]

    return scaled


def _of_order_1(eigenvalues: Tensor) -> Tensor:
    return torch.special.entr(eigenvalues.clamp(min=0)).sum(-1).exp()


def _of_order(eigenvalues: Tensor, order: float) -> float:
    # rounding makes small eigenvalues of either sign out of zeros, which a small order would count
    noise = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues.max()
    shares = eigenvalues[eigenvalues > noise]
    shares = shares / shares.sum()
    if math.isinf(order):
        return float(1 / shares.max())
    return float((order * shares.log()).logsumexp(0).div(1 - order).exp())
