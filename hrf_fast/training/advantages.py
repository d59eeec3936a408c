"""Advantages: rewards standardised against their peers. Pure functions, no state."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group: Tensor, *, floor: float) -> Tensor:
    """Standardise rewards within each group (HRF, arXiv 2410.08315).

    Args:
        rewards: [B] fp32.
        group: [B] int64; a group shares its anchor, so its mean is the baseline. One value for all: the whole batch.
        floor: least standard deviation to divide by, in units of the reward. It keeps a group whose rewards hardly
            differ from being blown up to full-size advantages.

    Returns:
        [B] fp32: (reward − mean)/max(std, floor), with the unbiased std. A group of equal rewards gets zeros.

    Raises:
        ValueError: a group of one sample has no spread to standardise by, or a floor that is not positive.
    """
    if not floor > 0:
        raise ValueError(f"train.advantage_floor is {floor}; it divides, so use a positive number")
    _, index, sizes = group.unique(return_inverse=True, return_counts=True)
    if int(sizes.min()) < 2:
        raise ValueError("train.group_size is 1: one sample has no spread to standardise by; use at least 2")
    rewards = rewards.double()
    zeros = torch.zeros(len(sizes), dtype=rewards.dtype, device=rewards.device)
    mean = zeros.index_add(0, index, rewards) / sizes
    centred = rewards - mean[index]
    std = (zeros.index_add(0, index, centred.square()) / (sizes - 1)).sqrt()
    return (centred / std.clamp(min=floor)[index]).float()
