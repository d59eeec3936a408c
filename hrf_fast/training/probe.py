"""Search: what HRF-D measures of candidate starts, for all groups of a rank at once.

`exact` is the published measurement: the group is re-noised to a candidate and denoised deterministically to the end,
T − start UNet evaluations a sample. `x0` scores the one-step estimate of the clean image at the candidate instead, one
evaluation a sample. Which candidates are asked for, and what is chosen, is in `hrf_fast.windows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hrf_fast.noise import NoiseKey
from hrf_fast.policies.pixel import Policy
from hrf_fast.rewards import CombinedReward
from hrf_fast.training.calls import together
from hrf_fast.training.rollout import renoised
from hrf_fast.windows.base import check_estimate
from hrf_kernels import gaussian_mean


@dataclass(frozen=True)
class _Lane:
    """Samples of one group at one candidate start, at most sample.batch_size."""

    group: int
    start: int
    noise: NoiseKey


@torch.no_grad()
def probe_starts(
    policy: Policy,
    reward: CombinedReward,
    anchors: Sequence[Tensor],
    candidates: Sequence[Sequence[int]],
    noises: Sequence[NoiseKey],
    *,
    estimate: str = "exact",
    batch_size: int,
) -> list[tuple[Tensor, Tensor]]:
    """Reward and distance of each group at each of its candidate starts.

    Args:
        anchors: clean latents [C, H, W], one per group; candidates: the starts to measure, a list per group.
        noises: re-noise each group's anchor, one number per sample, the same at every candidate.
        estimate: exact or x0; batch_size: images per UNet call at most.

    Returns:
        Per group the mean reward and the mean distance 1 − cos(x̃0, x0) on flattened pixels over all its samples, each
        [C] fp32 on the CPU in the order of its candidates.

    Raises:
        ValueError: another estimate.
    """
    measure = _MEASURES[check_estimate(estimate)]
    lanes = [
        _Lane(group, start, part)
        for group, starts in enumerate(candidates)
        for start in starts
        for part in noises[group].split(batch_size)
    ]
    rewards, distances = [], []
    for call, clean in measure(policy, anchors, lanes, batch_size):
        own = torch.stack([anchors[lanes[index].group] for index in call for _ in lanes[index].noise.sample_id])
        rewards.append(reward(policy.images(clean)).total)
        distances.append(1 - torch.cosine_similarity(clean.flatten(1), own.flatten(1)))
    if not lanes:
        return [(torch.zeros(0), torch.zeros(0)) for _ in candidates]
    samples = torch.stack([torch.cat(rewards), torch.cat(distances)])
    found = []
    counts = [len(starts) * len(noise) for starts, noise in zip(candidates, noises, strict=True)]
    for part, noise in zip(samples.split(counts, dim=1), noises, strict=True):
        found.append(part.reshape(2, -1, len(noise)).mean(2))
    # one copy from the device
    means = torch.cat(found, dim=1).cpu().split([len(starts) for starts in candidates], dim=1)
    return [(group[0], group[1]) for group in means]


# lanes that share a call and the clean latents of their samples, every lane once and in their order
_Clean = Iterator[tuple[list[int], Tensor]]


def _denoised(policy: Policy, anchors: Sequence[Tensor], lanes: Sequence[_Lane], batch_size: int) -> _Clean:
    """The deterministic rollout of every lane; each joins the calls when the step reaches its start."""
    if not lanes:
        return
    sizes, steps = [len(lane.noise) for lane in lanes], len(policy.diffusion)
    latents: dict[int, Tensor] = {}
    for step, call in together([lane.start for lane in lanes], sizes, steps, max_batch=batch_size):
        for index in call:
            if lanes[index].start == step:
                latents[index] = renoised(policy, anchors[lanes[index].group], step, lanes[index].noise)
        batch = torch.cat([latents[index] for index in call])
        output = policy.model_output(batch, policy.timestep_list[step])
        batch = gaussian_mean(output, batch, policy.diffusion.deterministic[step])
        latents |= zip(call, batch.split([sizes[index] for index in call]), strict=True)
        if step == steps - 1:
            yield call, batch


def _estimated(policy: Policy, anchors: Sequence[Tensor], lanes: Sequence[_Lane], batch_size: int) -> _Clean:
    """x̂0 of every lane by one UNet evaluation, clamped where the scheduler clips its own."""
    table = policy.diffusion.deterministic
    none = torch.zeros_like(table.mean_x0)
    # the step whose mean is its x0
    estimate = replace(table, mean_x0=none + 1, mean_latents=none, mean_output=none)
    sizes = [len(lane.noise) for lane in lanes]
    # packed as lanes of a single step
    for _, call in together([0] * len(lanes), sizes, 1, max_batch=batch_size) if lanes else ():
        steps = torch.tensor([lanes[index].start for index in call for _ in range(sizes[index])], device=policy.device)
        batch = torch.cat([renoised(policy, anchors[lanes[i].group], lanes[i].start, lanes[i].noise) for i in call])
        output = policy.model_output(batch, policy.diffusion.timesteps[steps])
        yield call, gaussian_mean(output, batch, estimate[steps])


_MEASURES: dict[str, Callable[..., _Clean]] = {"exact": _denoised, "x0": _estimated}
