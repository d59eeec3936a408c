"""Collect: one iteration's anchors, windows and group rollouts, and the advantages of their rewards.

Every rank does this for its own groups, under the group and sample numbers of the whole iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hrf_fast import comm, seeds
from hrf_fast.advantages import group_advantages
from hrf_fast.learn import own_groups
from hrf_fast.metrics import Scores
from hrf_fast.options import Config
from hrf_fast.parts import Parts
from hrf_fast.rewards import CombinedReward, NotFiniteError, RewardError
from hrf_fast.rollout import probe_starts, renoised, rollout, sample, starting_noise
from hrf_fast.run import Run
from hrf_fast.seeds import NoiseKey
from hrf_fast.trajectory import Trajectory, Window


def collect(parts: Parts, config: Config, run: Run, iteration: int) -> tuple[dict[int, Trajectory], list[Window]]:
    """One window per group, chosen by the schedule, and one rollout per group.

    A schedule with anchors (HRF) denoises one image per group, then re-noises it to the window's start; one without
    (DDPO) starts from pure noise.

    Returns:
        The trajectories of this rank's groups, by group, and the windows of all groups.
    """
    policy, train, batch_size = parts.policy, config.train, config.sample.batch_size
    groups, size = train.groups_per_iteration, train.group_size
    sample_id = torch.arange(groups * size, device=policy.device).reshape(groups, size)
    own = own_groups(config)

    def noise(purpose: str, ids: Tensor) -> NoiseKey:
        return NoiseKey(seeds.key(config.run.seed, iteration, purpose), ids)

    anchors: dict[int, Tensor] = {}
    if parts.schedule.needs_anchors:
        with run.phase("anchors"):
            place = noise("anchors", torch.tensor(own, device=policy.device))
            anchors = dict(zip(own, sample(policy, place, batch_size=batch_size), strict=True))

    def probe(group: int, candidates: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of one of this rank's groups; a group of another rank gets zeros, and its window from that rank."""
        if group not in anchors:
            return torch.zeros(len(candidates)), torch.zeros(len(candidates))
        place = noise("search", sample_id[group])
        return probe_starts(policy, parts.reward, anchors[group], candidates, place, batch_size=batch_size)

    with run.phase("search"):
        generator = seeds.generator(config.run.seed, iteration, "windows")
        windows = parts.schedule(iteration, groups, generator=generator, probe=probe)
        _check_windows(windows, groups, policy.diffusion.stochastic_steps, config.window.schedule)
        # what was probed is known to one rank only
        for found in comm.gather({group: windows[group] for group in own}):
            windows = [found.get(group, window) for group, window in enumerate(windows)]
    trajectories = {}
    with run.phase("rollout"):
        for group in own:
            window = windows[group]
            place = noise("rollout", sample_id[group])
            if parts.schedule.needs_anchors:
                start = renoised(policy, anchors[group], window.start, place)
            else:
                start = starting_noise(policy, place)
            trajectories[group] = rollout(policy, window, start, place, micro_batch_size=train.micro_batch_size or size)
    return trajectories, windows


def _check_windows(windows: Any, groups: int, stop: int, name: str) -> None:
    """A schedule of the user's may return anything."""
    if not isinstance(windows, list) or not all(isinstance(window, Window) for window in windows):
        raise ValueError(f"window.schedule {name} returned {windows!r}; return a list of Window(start, stop)")
    if len(windows) != groups:
        raise ValueError(f"window.schedule {name} returned {len(windows)} windows for {groups} groups; return one each")
    last = max(window.stop for window in windows)
    if last > stop:
        raise ValueError(f"window.schedule {name} returned a window to {last}; steps from {stop} are deterministic")


# rewards [group_size] on the CPU, and the mean of each reward term
_Scored = tuple[Tensor, dict[str, float]]


def score(
    parts: Parts,
    config: Config,
    trajectories: dict[int, Trajectory],
    *,
    iteration: int,
    note: Callable[[str], None],
) -> Scores:
    """Score the samples of every rank, and standardise the rewards against their peers.

    Raises:
        RewardError: a reward failed on some rank, or is not finite.
    """
    train = config.train
    with comm.agreed():
        own = _score_own(parts.reward, trajectories, train.on_nan, f"iteration {iteration}, ")
    scored = {group: score for part in comm.gather(own) for group, score in part.items()}
    finite = {group: score for group in sorted(scored) if not isinstance(score := scored[group], str)}
    for group in sorted(set(scored) - set(finite)):
        note(f"iteration {iteration}, group {group}: its optimizer step is skipped: {scored[group]}")
    if not finite:
        raise comm.on_all_ranks(
            RewardError(f"iteration {iteration}: no group has finite rewards, so there is nothing to learn from")
        )
    peers = torch.arange(len(finite)).repeat_interleave(train.group_size)
    if train.advantages == "batch":
        peers = torch.zeros_like(peers)
    found = group_advantages(torch.cat([values for values, _ in finite.values()]), peers, floor=train.advantage_floor)
    advantages = dict(zip(finite, found.to(parts.policy.device).split(train.group_size), strict=True))
    terms = [terms for _, terms in finite.values()]
    lost = torch.full((train.group_size,), torch.nan)
    return Scores(
        torch.cat([finite[group][0] if group in finite else lost for group in sorted(scored)]),
        [advantages.get(group) for group in sorted(scored)],
        {name: sum(term[name] for term in terms) / len(terms) for name in terms[0]},
    )


def _score_own(
    reward: CombinedReward, trajectories: dict[int, Trajectory], on_nan: str, where: str
) -> dict[int, _Scored | str]:
    """Each group's score, what is wrong with one to skip; all groups are one batch, as long as it is finite."""

    def call(images: Tensor) -> _Scored:
        values = reward(images).cpu()
        return values, {name: float(value) for name, value in reward.last_terms.items()}

    try:
        values, terms = call(torch.cat([trajectory.images for trajectory in trajectories.values()]))
        return {
            group: (part, terms)
            for group, part in zip(trajectories, values.split(len(values) // len(trajectories)), strict=True)
        }
    except NotFiniteError as error:
        whole = error
    own: dict[int, _Scored | str] = {}
    for group, trajectory in trajectories.items():
        try:
            own[group] = call(trajectory.images)
        except NotFiniteError as error:
            if on_nan == "stop":
                raise NotFiniteError(f"{where}group {group}: {error}") from error
            own[group] = str(error)
    if on_nan == "stop":
        # finite at the second time of asking, which is no better
        raise NotFiniteError(f"{where}groups {', '.join(map(str, trajectories))}: {whole}") from whole
    return own
