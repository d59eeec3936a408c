"""The Vendi Score of any order and of two kernels, for thousands of images.

exp of the Rényi entropy of order q of the eigenvalues λ of K/N (Friedman and Dieng, arXiv 2210.02410; orders: Pasarkar
and Dieng, arXiv 2310.12952): an effective number of images. A small order counts rare images more, a large one less;
infinity is 1/max λ. Panels have the order 1 and the cosine kernel: `evaluation.diversity`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hrf_fast.evaluation.diversity import unit_rows

KERNELS = ("cosine", "rbf")


def vendi(features: Tensor, *, kernel: str = "cosine", order: float = 1.0, bandwidth: float | None = None) -> float:
    """The Vendi Score of features [N, D], from 1 for equal images to N.

    The eigenvalues of the cosine kernel are those of a [D, D] matrix where D < N: 10,000 images of 128 features take
    a tenth of a second. The RBF kernel has N of its own, in N² memory and N³ time; its order 2 needs none.

    Args:
        kernel: cosine, or rbf, exp(−‖a − b‖²/(2·bandwidth²)).
        order: above 0, inf too; bandwidth: of rbf; compare at equal bandwidths, such as `median_distance` of one model.

    Raises:
        ValueError: another kernel, an order or bandwidth that is not above 0, rbf without a bandwidth or cosine with
            one, or features that have no direction.
    """
    if kernel not in KERNELS or not order > 0:
        raise ValueError(f"kernel is {kernel!r} and order is {order}; use one of {', '.join(KERNELS)}, and above 0")
    if (kernel == "rbf") != (bandwidth is not None) or (bandwidth is not None and not bandwidth > 0):
        raise ValueError(f"bandwidth is {bandwidth} with kernel {kernel!r}; rbf needs one above 0, cosine has none")
    if bandwidth is None:
        rows = unit_rows(features) / math.sqrt(len(features))
        gram = rows.mT @ rows if rows.shape[1] < rows.shape[0] else rows @ rows.mT
    else:
        rows = features.detach().to("cpu", torch.float64)
        gram = distances(rows, rows).square_().div_(-2 * bandwidth**2).exp_().div_(len(rows))
    if order == 2:
        # the sum of squared eigenvalues is the squared Frobenius norm
        return float(1 / gram.square().sum())
    return _of_spectrum(torch.linalg.eigvalsh(gram), order)


def _of_spectrum(eigenvalues: Tensor, order: float) -> float:
    # rounding makes small eigenvalues of either sign out of zeros, which a small order would count
    noise = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues.max()
    shares = eigenvalues[eigenvalues > noise]
    shares = shares / shares.sum()
    if order == 1:
        return float(torch.special.entr(shares).sum().exp())
    if math.isinf(order):
        return float(1 / shares.max())
    return float((order * shares.log()).logsumexp(0).div(1 - order).exp())


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances [N, M] of rows, in the type of `a`; 0 on the diagonal where b is a."""
    if a is b:
        matrix = torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")
        return matrix.fill_diagonal_(0)
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")


def median_distance(features: Tensor, *, most: int = 2000) -> float:
    """The median distance between two of the first `most` rows: the usual bandwidth (Garreau et al., 1707.07269).

    Raises:
        ValueError: fewer than two rows, or all of them equal.
    """
    rows = features[:most].detach().to("cpu", torch.float64)
    if len(rows) < 2:
        raise ValueError(f"features have shape {list(features.shape)}; a distance needs two rows")
    median = float(torch.pdist(rows).median())
    if not median > 0:
        raise ValueError("the median distance between features is 0: more than half of the pairs are equal")
    return median
