"""Remedies: changes of a group's advantages that keep its samples apart. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def novelty(features: Tensor) -> Tensor:
    """How far each sample is from its nearest neighbour in the group, in means of that (GARDO, arXiv 2512.24138).

    Args:
        features: [B, D] of a group's images, B at least 2.

    Returns:
        [B] fp64: d/mean(d) with d = min over the others of 1 − cos; ones where all images are the same.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    cosine = (unit @ unit.T).clamp(-1, 1).fill_diagonal_(-torch.inf)
    nearest = 1 - cosine.amax(1)
    return nearest / nearest.mean() if nearest.any() else torch.ones_like(nearest)


def favour_novel(advantages: Tensor, factors: Tensor) -> Tensor:
    """Multiply the positive advantages [B] by the factors [B] of `novelty`, as GARDO's code does; others stay."""
    return torch.where(advantages > 0, advantages * factors.to(advantages), advantages)


def matching_advantages(rewards: Tensor, log_prob: Tensor, *, sharpness: float) -> Tensor:
    """Advantages under which the clipped loss has the gradient of trajectory matching (Uni-TMPO, arXiv 2605.10983).

    Matching minimises the forward KL of q = softmax(sharpness·rewards) to p = softmax(s), where s is each trajectory's
    log-prob: L = −Σ q log p, so ∂L/∂s = p − q. On policy the clipped loss has ∂/∂s = −A/B, hence A = B·(q − p). It is
    bounded, of sum 0, and zero once a group is as likely as its rewards say: nothing pushes all of p to the best one.

    Args:
        rewards: [B] standardised in the group; all zero where they are equal, which is left alone.
        log_prob: [B] of each trajectory under the policy that drew it, summed over its window's steps.
    """
    if not rewards.any():
        return torch.zeros_like(rewards)
    target, policy = (sharpness * rewards.double()).softmax(0), log_prob.double().softmax(0)
    return (len(rewards) * (target - policy)).to(rewards)
