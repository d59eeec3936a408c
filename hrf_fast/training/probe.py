"""Probe: measure candidate starts for HRF-D, for all groups of a rank at once.

`exact` is the published measurement: the group is re-noised to a candidate and denoised deterministically to the end,
T − start network evaluations a sample. `x0` rewards the one-step estimate of the clean image at the candidate instead,
one evaluation a sample. Which candidates are asked for, and what is chosen, is in `hrf_fast.windows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hrf_fast.distributed import comm
from hrf_fast.noise import NoiseKey
from hrf_fast.policies.base import Condition, Policy
from hrf_fast.policies.sample import follow, renoised
from hrf_fast.prompts import Prompt
from hrf_fast.registry import qualified_name
from hrf_fast.rewards import CombinedReward
from hrf_fast.training.calls import together
from hrf_fast.training.components import Components
from hrf_fast.windows.base import check_estimate
from hrf_kernels import gaussian_mean


class StartProbe:
    """The `Probe` of one iteration: every group's candidates, measured by the rank that holds the group."""

    def __init__(
        self,
        components: Components,
        anchors: Mapping[int, Tensor],
        noises: Mapping[int, NoiseKey],
        prompts: Sequence[Prompt | None],
    ) -> None:
        """`anchors` and `noises` are those of this rank's groups, by number; `prompts` of all groups."""
        self._components, self._anchors, self._noises, self._prompts = components, anchors, noises, prompts

    def __call__(self, candidates: Sequence[Sequence[int]], *, estimate: str = "exact") -> list[tuple[Tensor, Tensor]]:
        """Mean rewards and mean distances of each group's candidates; collective.

        Raises:
            ValueError: groups without anchors, another number of lists than groups, or a start that is no step.
        """
        components = self._components
        groups, numbers = components.groups, components.groups.own()
        with comm.agreed():
            self._check(candidates)
            measured = probe_starts(
                components.policy,
                components.reward,
                [self._anchors[group] for group in numbers],
                [candidates[group] for group in numbers],
                [self._noises[group] for group in numbers],
                [self._prompts[group] for group in numbers],
                estimate=estimate,
                images_per_call=components.call_plan.sampled,
                guided=components.algorithm.guided,
            )
        by_group: dict[int, tuple[Tensor, Tensor]] = {}
        for part in comm.gather(dict(zip(numbers, measured, strict=True))):
            by_group |= part
        return [by_group[group] for group in range(groups.per_iteration)]

    def _check(self, candidates: Any) -> None:
        """Refuse what a user's schedule may have asked for."""
        option = f"window.schedule {qualified_name(self._components.schedule)}"
        groups, steps = self._components.groups.per_iteration, len(self._components.policy.sampler)
        if not self._anchors:
            raise ValueError(f"{option} probes starts, for which groups need anchors; let its needs_anchors be True")
        if len(candidates) != groups:
            raise ValueError(f"{option} probes {candidates!r} for {groups} groups; give one list of starts per group")
        wrong = [start for starts in candidates for start in starts if start not in range(steps)]
        if wrong:
            raise ValueError(f"{option} probes start {wrong[0]!r}; use whole numbers from 0 to {steps - 1}")


@dataclass(frozen=True)
class _Lane:
    """Samples of one group at one candidate start, at most as many as share a call."""

    group: int
    start: int
    noise: NoiseKey
    prompt: Prompt | None
    condition: Condition
    """One row, of all samples."""


@torch.no_grad()
def probe_starts(
    policy: Policy,
    reward: CombinedReward,
    anchors: Sequence[Tensor],
    candidates: Sequence[Sequence[int]],
    noises: Sequence[NoiseKey],
    prompts: Sequence[Prompt | None] | None = None,
    *,
    estimate: str = "exact",
    images_per_call: int,
    guided: bool = True,
) -> list[tuple[Tensor, Tensor]]:
    """Reward and distance of each group at each of its candidate starts.

    Args:
        anchors: clean latents [*latent_shape], one per group; candidates: the starts to measure, a list per group.
        noises: re-noise each group's anchor, one number per sample, the same at every candidate.
        prompts: of each group; None for a model that takes none.
        estimate: exact or x0; images_per_call: at most; guided: see `Policy.condition`.

    Returns:
        Per group the mean reward and the mean distance 1 − cos(x̃0, x0) on flattened latents over all its samples, each
        [C] on the CPU in the order of its candidates; fp32, or fp64 for a reward of fp64.

    Raises:
        ValueError: another estimate.
    """
    measure = _MEASURES[check_estimate(estimate)]
    prompts = [None] * len(anchors) if prompts is None else prompts
    # one row of each group's: a copy for every sample and start is gigabytes with large text encoders
    rows = [policy.condition([prompt], guided=guided) for prompt in prompts]
    lanes = [
        _Lane(group, start, part, prompts[group], rows[group])
        for group, starts in enumerate(candidates)
        for start in starts
        for part in noises[group].split(images_per_call)
    ]
    rewards, distances = [], []
    for call, clean in measure(policy, anchors, lanes, images_per_call):
        origins = torch.stack([anchors[lanes[index].group] for index in call for _ in lanes[index].noise.sample_id])
        asked = [lanes[index].prompt for index in call for _ in lanes[index].noise.sample_id]
        rewards.append(reward(policy.decode(clean), asked).total)
        distances.append(1 - torch.cosine_similarity(clean.flatten(1), origins.flatten(1)))
    if not lanes:
        return [(torch.zeros(0), torch.zeros(0)) for _ in candidates]
    samples = torch.stack([torch.cat(rewards), torch.cat(distances)])
    group_means = []
    counts = [len(starts) * len(noise) for starts, noise in zip(candidates, noises, strict=True)]
    for part, noise in zip(samples.split(counts, dim=1), noises, strict=True):
        group_means.append(part.reshape(2, -1, len(noise)).mean(2))
    # one copy from the device
    means = torch.cat(group_means, dim=1).cpu().split([len(starts) for starts in candidates], dim=1)
    return [(group[0], group[1]) for group in means]


# lanes that share a call and the clean latents of their samples, every lane once and in their order
_Clean = Iterator[tuple[list[int], Tensor]]


def _denoised(policy: Policy, anchors: Sequence[Tensor], lanes: Sequence[_Lane], images_per_call: int) -> _Clean:
    """The deterministic rollout of every lane; each joins the calls when the step reaches its start."""
    if not lanes:
        return
    sizes, steps = [len(lane.noise) for lane in lanes], len(policy.sampler)
    latents: dict[int, Tensor] = {}
    for step, call in together([lane.start for lane in lanes], sizes, steps, images_per_call=images_per_call):
        for index in call:
            if lanes[index].start == step:
                latents[index] = renoised(policy, anchors[lanes[index].group], step, lanes[index].noise)
        batch = torch.cat([latents[index] for index in call])
        prediction = policy.predict(batch, step, _condition(lanes[index] for index in call))
        batch = follow(policy, prediction, batch, step)
        latents |= zip(call, batch.split([sizes[index] for index in call]), strict=True)
        if step == steps - 1:
            yield call, batch


def _estimated(policy: Policy, anchors: Sequence[Tensor], lanes: Sequence[_Lane], images_per_call: int) -> _Clean:
    """x̂0 of every lane by one network evaluation, clamped where the scheduler clips its own."""
    sizes = [len(lane.noise) for lane in lanes]
    # packed as lanes of a single step
    for _, call in together([0] * len(lanes), sizes, 1, images_per_call=images_per_call) if lanes else ():
        steps = torch.tensor([lanes[index].start for index in call for _ in range(sizes[index])], device=policy.device)
        batch = torch.cat([renoised(policy, anchors[lanes[i].group], lanes[i].start, lanes[i].noise) for i in call])
        prediction = policy.predict(batch, steps, _condition(lanes[index] for index in call))
        yield call, gaussian_mean(prediction.combined, batch, policy.sampler.clean[steps])


def _condition(lanes: Iterable[_Lane]) -> Condition:
    """The condition of a call, a row for each sample."""
    return Condition.join([lane.condition.repeat(len(lane.noise)) for lane in lanes])


_MEASURES: dict[str, Callable[..., _Clean]] = {"exact": _denoised, "x0": _estimated}
