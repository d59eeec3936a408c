"""Collect: one iteration's anchors and windows, and the rollouts of its groups.

Every rank does this for its own groups, under the group and sample numbers of the whole iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hrf_fast.config.options import Config
from hrf_fast.distributed import comm
from hrf_fast.noise import NoiseKey, noise_generator, noise_key
from hrf_fast.policies.pixel import Policy
from hrf_fast.policies.sample import sample, starting_noise
from hrf_fast.run.folder import Run
from hrf_fast.training.calls import packs_of
from hrf_fast.training.components import Parts
from hrf_fast.training.probe import probe_starts
from hrf_fast.training.rewarding import GroupScore, score_groups
from hrf_fast.training.rollout import Start, renoised, rollout
from hrf_fast.training.update import Batch, own_groups
from hrf_fast.windows.base import Window


@dataclass(frozen=True)
class Plan:
    """An iteration before its rollouts."""

    windows: list[Window]
    """Of all groups."""
    anchors: dict[int, Tensor]
    """[C, H, W] of each group of this rank; empty where groups start from pure noise."""


def plan(parts: Parts, config: Config, run: Run, iteration: int) -> Plan:
    """One window per group, chosen by the schedule, and the anchor that a group is re-noised from (HRF)."""
    policy, batch_size = parts.policy, config.compute.batch_size
    groups, own = config.train.groups_per_iteration, own_groups(config)
    anchors: dict[int, Tensor] = {}
    if parts.schedule.needs_anchors:
        with run.phase("anchors"):
            place = NoiseKey(noise_key(config.run.seed, iteration, "anchors"), torch.tensor(own, device=policy.device))
            anchors = dict(zip(own, sample(policy, place, batch_size=batch_size), strict=True))

    def probe(candidates: Sequence[Sequence[int]], *, estimate: str = "exact") -> list[tuple[Tensor, Tensor]]:
        """Of every group, measured by the rank that holds it."""
        with comm.agreed():
            _check_candidates(candidates, groups, bool(anchors), len(policy.diffusion), config.window.schedule)
            measured = probe_starts(
                policy,
                parts.reward,
                [anchors[group] for group in own],
                [candidates[group] for group in own],
                [_noise(config, policy, iteration, "search", group) for group in own],
                estimate=estimate,
                batch_size=batch_size,
            )
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for part in comm.gather(dict(zip(own, measured, strict=True))):
            found |= part
        return [found[group] for group in range(groups)]

    with run.phase("search"):
        generator = noise_generator(config.run.seed, iteration, "windows")
        windows = parts.schedule(iteration, groups, generator=generator, probe=probe)
        _check_windows(windows, groups, policy.diffusion.stochastic_steps, config.window.schedule)
    return Plan(windows, anchors)


def collect(
    parts: Parts, config: Config, run: Run, iteration: int, plan: Plan, groups: Sequence[int]
) -> tuple[Batch, list[Future[dict[int, GroupScore]]]]:
    """Roll out groups of this rank, each from its anchor re-noised to its window's start, or from pure noise.

    Groups that fit into `compute.max_batch` images advance together; the rewards of one pack are computed while the
    next one denoises.
    """
    policy, train, compute = parts.policy, config.train, config.compute
    windows = {group: plan.windows[group] for group in groups}
    keep_from = parts.activations.keep_from(windows, train.group_size)
    batch, scores = Batch({}, []), []
    for pack in packs_of(windows, train.group_size, compute.max_batch):
        with run.phase("rollout"):
            starts = {}
            for group, window in pack.items():
                place = _noise(config, policy, iteration, "rollout", group)
                if group in plan.anchors:
                    latents = renoised(policy, plan.anchors[group], window.start, place)
                else:
                    latents = starting_noise(policy, place)
                starts[group] = Start(window, latents, place)
            trajectories, calls = rollout(
                policy,
                starts,
                micro_batch_size=config.samples_per_call,
                max_batch=compute.max_batch,
                keep_from=keep_from,
            )
        batch.trajectories |= trajectories
        batch.calls += calls
        images = {group: trajectory.images for group, trajectory in trajectories.items()}
        scores.append(parts.background.submit(score_groups, parts.reward, images))
    return batch, scores


def _noise(config: Config, policy: Policy, iteration: int, purpose: str, group: int) -> NoiseKey:
    """The noise of a group's samples, which are numbered over the whole iteration."""
    size = config.train.group_size
    ids = torch.arange(group * size, (group + 1) * size, device=policy.device)
    return NoiseKey(noise_key(config.run.seed, iteration, purpose), ids)


def _check_candidates(candidates: Any, groups: int, anchors: bool, steps: int, name: str) -> None:
    """A schedule of the user's may ask for anything."""
    if not anchors:
        raise ValueError(
            f"window.schedule {name} probes starts, for which groups need anchors; let its needs_anchors be True"
        )
    if len(candidates) != groups:
        raise ValueError(
            f"window.schedule {name} probes {candidates!r} for {groups} groups; give one list of starts per group"
        )
    wrong = [start for starts in candidates for start in starts if not 0 <= start < steps]
    if wrong:
        raise ValueError(f"window.schedule {name} probes start {wrong[0]}; use starts from 0 to {steps - 1}")


def _check_windows(windows: Any, groups: int, stop: int, name: str) -> None:
    """A schedule of the user's may return anything."""
    if not isinstance(windows, list) or not all(isinstance(window, Window) for window in windows):
        raise ValueError(f"window.schedule {name} returned {windows!r}; return a list of Window(start, stop)")
    if len(windows) != groups:
        raise ValueError(f"window.schedule {name} returned {len(windows)} windows for {groups} groups; return one each")
    last = max(window.stop for window in windows)
    if last > stop:
        raise ValueError(f"window.schedule {name} returned a window to {last}; steps from {stop} are deterministic")
