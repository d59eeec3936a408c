"""Prefix: the deterministic steps from pure noise to a window, for groups whose windows ask for it.

They are part of no window: nothing is kept of them but the latents that they lead to.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from hrf_fast.policies.base import Condition, Policy
from hrf_fast.policies.sample import follow, starting_noise
from hrf_fast.training.calls import filled
from hrf_fast.training.groups import Group


@torch.no_grad()
def prefixes(policy: Policy, groups: Collection[Group], *, images_per_call: int) -> dict[int, Tensor]:
    """Latents at the first step of each group's window, by the group's number.

    Args:
        images_per_call: at most; a sample's latents do not depend on it, but for rounding.

    Returns:
        [B, *latent_shape] fp32. Where the window is `shared` all rows are those of the group's first sample, and no
        other is denoised.
    """
    lanes = [
        (group, rows)
        for group in groups
        for rows in ([slice(0, 1)] if group.window.shared else _slices(group.size, images_per_call))
    ]
    latents = [starting_noise(policy, group.noise[rows]) for group, rows in lanes]
    sizes = [len(part) for part in latents]
    for step in range(max(group.window.start for group in groups)):
        active = [lane for lane, (group, _) in enumerate(lanes) if group.window.start > step]
        for call in filled(active, sizes, images_per_call):
            batch = torch.cat([latents[lane] for lane in call])
            condition = Condition.join([group.condition[rows] for group, rows in (lanes[lane] for lane in call)])
            batch = follow(policy, policy.predict(batch, step, condition), batch, step)
            for lane, part in zip(call, batch.split([sizes[lane] for lane in call]), strict=True):
                latents[lane] = part
    parts: dict[int, list[Tensor]] = {group.number: [] for group in groups}
    for (group, _), part in zip(lanes, latents, strict=True):
        parts[group.number].append(part)
    return {
        group.number: torch.cat(parts[group.number]).expand(group.size, *policy.latent_shape).contiguous()
        for group in groups
    }


def _slices(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
