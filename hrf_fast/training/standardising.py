"""Standardising: rewards made advantages against their peers. Pure functions, no state."""

import torch
from torch import Tensor

# a spread of fewer rounding steps has less than two digits
_ROUNDING_STEPS = 64


def group_advantages(
    rewards: Tensor, group: Tensor, *, floor: float, scale: str = "std", baseline: str = "mean"
) -> Tensor:
    """Standardise rewards within each group (HRF, arXiv 2410.08315).

    Args:
        rewards: [B] fp32 or fp64.
        group: [B] int64; a group shares its anchor, so its mean is the baseline. One value for all: the whole batch.
        floor: least standard deviation to divide by, in units of the reward. It keeps a group whose rewards hardly
            differ from being blown up to full-size advantages.
        scale: std, of the group; batch, the std of all B rewards, Flow-GRPO's default (arXiv 2505.05470); or none for
            reward − mean (Dr. GRPO, arXiv 2503.20783). With the two latter a group that hardly differs teaches little.
        baseline: mean, or leave_one_out for that of the others (RLOO, arXiv 2402.14740): n/(n − 1) of the deviation. A
            mean that has the reward itself in it makes the gradient (n − 1)/n of the unbiased one.

    Returns:
        [B] fp32: (reward − mean)/max(std, floor), with the unbiased std. A group of equal rewards gets zeros.

    Raises:
        ValueError: a group of one sample has no spread to standardise by, or a floor that is not positive.
    """
    if not floor > 0:
        raise ValueError(f"train.advantage_floor is {floor}; it divides, so use a positive number")
    index, centred, _, std = _moments(rewards, group)
    if scale == "batch":
        std = spreads(rewards, torch.zeros_like(group)).expand_as(std)
    if baseline == "leave_one_out":
        sizes = index.bincount()
        centred = centred * (sizes / (sizes - 1))[index]
    return (centred if scale == "none" else centred / std.clamp(min=floor)[index]).float()


def spreads(rewards: Tensor, group: Tensor) -> Tensor:
    """Unbiased std of each group [G] fp64, in ascending order of its number; arguments as `group_advantages`."""
    return _moments(rewards, group)[3]


def within_band(rewards: Tensor, group: Tensor, *, band: float) -> Tensor:
    """Clip rewards to mean ± band·std of their group (after DRIFT, arXiv 2601.12401); arguments as `group_advantages`.

    Returns:
        [B] fp64. A reward far above its peers pulls no harder than one at the edge of the band.
    """
    index, centred, mean, std = _moments(rewards, group)
    edge = (band * std)[index]
    return mean[index] + centred.clamp(-edge, edge)


def weak_spreads(rewards: Tensor, group: Tensor, *, floor: float) -> dict[str, str]:
    """Say where advantages are not what the rewards mean; arguments as `group_advantages`.

    Returns:
        Sentences by kind: groups under the floor, whose advantages are small; and groups whose spread is a few rounding
        steps of their values, whose advantages are rounding noise. A group of equal rewards is neither.
    """
    _, _, mean, std = _moments(rewards, group)
    sentences = {}
    under = std[(std > 0) & (std < floor)]
    if len(under):
        least, share = float(under.min()), "all" if len(under) == len(std) else "some"
        sentences[f"floor, {share}"] = (
            f"{_count(under, std)} by {least:.2g}, which is under train.advantage_floor {floor:g}, so advantages are "
            f"down to {least / floor:.2g} of their size; lower the floor, or scale the reward"
        )
    # the distance between numbers of the rewards' type near the mean
    steps = torch.finfo(rewards.dtype).eps * mean.abs()
    rounded = (std > 0) & (std < _ROUNDING_STEPS * steps)
    if rounded.any():
        worst = int((std / steps).masked_fill(~rounded, torch.inf).argmin())
        sentences["rounding"] = (
            f"{_count(std[rounded], std)} by {float(std[worst]):.2g} around {float(mean[worst]):.4g}, where "
            f"numbers of {str(rewards.dtype).removeprefix('torch.')} are {float(steps[worst]):.2g} apart, so "
            "advantages are rounding noise; subtract the offset in the reward, or return float64"
        )
    return sentences


def _count(chosen: Tensor, std: Tensor) -> str:
    return f"the rewards of {len(chosen)} of {len(std)} groups spread" if len(std) > 1 else "the rewards spread"


def _moments(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index of the group [B] and deviation from its mean [B] of each sample; mean and unbiased std of each group, fp64.

    Raises:
        ValueError: a group of one sample has no spread to standardise by.
    """
    _, index, sizes = group.unique(return_inverse=True, return_counts=True)
    if int(sizes.min()) < 2:
        raise ValueError("train.group_size is 1: one sample has no spread to standardise by; use at least 2")
    zeros = torch.zeros(len(sizes), dtype=torch.float64, device=rewards.device)
    offset = zeros
    if rewards.dtype == torch.float64:
        # a sum of equal fp64 numbers is rounded, one of fp32 numbers is not
        offset = zeros.scatter_reduce(0, index, rewards, "amin", include_self=False)
    shifted = rewards.double() - offset[index]
    mean = zeros.index_add(0, index, shifted) / sizes
    centred = shifted - mean[index]
    std = (zeros.index_add(0, index, centred.square()) / (sizes - 1)).sqrt()
    return index, centred, mean + offset, std
