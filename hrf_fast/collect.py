"""Collect: one iteration's anchors, windows and group rollouts, and the advantages of their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hrf_fast import seeds
from hrf_fast.advantages import group_advantages
from hrf_fast.options import Config
from hrf_fast.parts import Parts
from hrf_fast.rollout import probe_starts, renoised, rollout, sample, starting_noise
from hrf_fast.run import Run
from hrf_fast.seeds import NoiseKey
from hrf_fast.trajectory import Trajectory, Window


def collect(parts: Parts, config: Config, run: Run, iteration: int) -> list[Trajectory]:
    """One window per group, chosen by the schedule, and one rollout per group.

    A schedule with anchors (HRF) denoises one image per group, then re-noises it to the window's start; one without
    (DDPO) starts from pure noise.
    """
    policy, train, batch_size = parts.policy, config.train, config.sample.batch_size
    groups, size = train.groups_per_iteration, train.group_size
    sample_id = torch.arange(groups * size, device=policy.device).reshape(groups, size)

    def noise(purpose: str, ids: Tensor) -> NoiseKey:
        return NoiseKey(seeds.key(config.run.seed, iteration, purpose), ids)

    anchors = torch.empty(0)
    if parts.schedule.needs_anchors:
        with run.phase("anchors"):
            anchors = sample(
                policy, noise("anchors", torch.arange(groups, device=policy.device)), batch_size=batch_size
            )

    def probe(group: int, candidates: Sequence[int]) -> tuple[Tensor, Tensor]:
        place = noise("search", sample_id[group])
        return probe_starts(policy, parts.reward, anchors[group], candidates, place, batch_size=batch_size)

    with run.phase("search"):
        generator = seeds.generator(config.run.seed, iteration, "windows")
        windows = parts.schedule(iteration, groups, generator=generator, probe=probe)
        _check_windows(windows, groups, policy.diffusion.stochastic_steps, config.window.schedule)
    trajectories = []
    with run.phase("rollout"):
        for group, window in enumerate(windows):
            place = noise("rollout", sample_id[group])
            if parts.schedule.needs_anchors:
                start = renoised(policy, anchors[group], window.start, place)
            else:
                start = starting_noise(policy, place)
            trajectories.append(rollout(policy, window, start, place, micro_batch_size=train.micro_batch_size or size))
    return trajectories


def _check_windows(windows: Any, groups: int, stop: int, name: str) -> None:
    """A schedule of the user's may return anything."""
    if not isinstance(windows, list) or not all(isinstance(window, Window) for window in windows):
        raise ValueError(f"window.schedule {name} returned {windows!r}; return a list of Window(start, stop)")
    if len(windows) != groups:
        raise ValueError(f"window.schedule {name} returned {len(windows)} windows for {groups} groups; return one each")
    last = max(window.stop for window in windows)
    if last > stop:
        raise ValueError(f"window.schedule {name} returned a window to {last}; steps from {stop} are deterministic")


def score(parts: Parts, config: Config, trajectories: Sequence[Trajectory]) -> tuple[Tensor, list[Tensor]]:
    """Rewards [N] of all samples and the advantages [group_size] of each group."""
    rewards = parts.reward(torch.cat([trajectory.images for trajectory in trajectories]))
    group = torch.arange(len(rewards), device=rewards.device) // config.train.group_size
    peers = group if config.train.advantages == "group" else torch.zeros_like(group)
    advantages = group_advantages(rewards, peers, floor=config.train.advantage_floor)
    return rewards, list(advantages.split(config.train.group_size))
