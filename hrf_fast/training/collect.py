"""Collect: an iteration's anchors and windows, and the rollouts of its groups.

Every rank does this for its own groups, under the group and sample numbers of the whole iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hrf_fast.distributed import comm
from hrf_fast.noise import NoiseKey, noise_generator, noise_key
from hrf_fast.policies.sample import sample, sample_deterministic
from hrf_fast.registry import qualified_name
from hrf_fast.run.session import Run
from hrf_fast.training.components import Components
from hrf_fast.training.groups import Group
from hrf_fast.training.prefix import prefixes
from hrf_fast.training.probe import StartProbe
from hrf_fast.training.rewarding import GroupRewards
from hrf_fast.training.rollout import Rollout, rollout
from hrf_fast.user_code import forgets, memory_of, note_of, user_code
from hrf_fast.windows.base import Window, with_noise


def begin(components: Components, run: Run, iteration: int) -> tuple[list[Window], dict[int, Group]]:
    """Draw anchors, where the schedule needs them, and let it choose a window for every group.

    Returns:
        The windows of all groups, and by number the groups of this rank.

    Raises:
        ValueError: a schedule of the user's has returned or probed what can't be.
    """
    policy, groups, schedule = components.policy, components.groups, components.schedule
    numbers, seed = groups.own(), components.algorithm.seed
    prompts, guided = components.draw_prompts(components.anchors.drawn_at(iteration)), components.algorithm.guided
    own_prompts = [prompts[number] for number in numbers]
    # of all groups at once: text encoders that are offloaded come to the device for it
    conditions = policy.condition(own_prompts, guided=guided)
    anchors: dict[int, Tensor] = {}
    if schedule.needs_anchors:
        with run.phase("anchors"):
            noise = NoiseKey(noise_key(seed, iteration, "anchors"), torch.tensor(numbers, device=policy.device))
            options: dict[str, Any] = {"images_per_call": components.call_plan.sampled, "guided": guided}

            def draw() -> Tensor:
                if few := components.anchors.steps:
                    return sample_deterministic(policy, noise, own_prompts, steps=few, **options)
                return sample(policy, noise, own_prompts, **options)

            anchors = components.anchors.take(iteration, numbers, policy.device, draw)
    with run.phase("search"):
        generator = noise_generator(seed, iteration, "windows")
        noises = {number: group_noise(components, iteration, "search", number) for number in numbers}
        probe = StartProbe(components, anchors, noises, prompts)
        what = f"window.schedule {qualified_name(schedule)}"
        failure: Exception | None = None
        changes: list[str] = []
        before = memory_of(schedule)
        try:
            with user_code(what) as changes:
                windows = schedule(iteration, groups.per_iteration, generator=generator, probe=probe)
        except Exception as error:
            # those of the probe name the schedule, and are every rank's
            if comm.said_by_main(error):
                raise
            named = not isinstance(error, ValueError) or str(error).startswith(what)
            failure = error if named else ValueError(f"{what}: {error}")
        if changes:
            run.note_once(note_of(what, changes), key=what)
        if line := forgets(what, schedule, before, "docs/windows.md"):
            run.note_once(line, key=f"{what}.state")
        # a probe, which is collective, begins with such a block: a rank that fails is heard by those that go on to one
        with comm.agreed():
            if failure is not None:
                raise failure
            _check_windows(
                windows, groups.per_iteration, policy.sampler.stochastic_steps, what, anchored=schedule.needs_anchors
            )
        if any(others != windows for others in comm.gather(windows)):
            raise comm.on_all_ranks(
                ValueError(
                    f"{what} returned other windows on one rank than on another; draw from `generator`, which is "
                    "alike on all of them"
                )
            )
        windows = with_noise(windows, components.algorithm.shared_noise)
    own_groups = {
        number: Group(
            number,
            windows[number],
            group_noise(components, iteration, "rollout", number),
            conditions[index : index + 1].expand(groups.size),
            anchors.get(number),
            prompt=prompts[number],
        )
        for index, number in enumerate(numbers)
    }
    if windows[0].deterministic and not anchors:
        with run.phase("anchors"):
            origins = prefixes(policy, own_groups.values(), images_per_call=components.call_plan.sampled)
        own_groups = {number: replace(group, origin=origins[number]) for number, group in own_groups.items()}
    return windows, own_groups


def collect(
    components: Components, run: Run, groups: Sequence[Group], iteration: int
) -> tuple[Rollout, list[Future[dict[int, GroupRewards]]]]:
    """Roll out groups of this rank; the rewards of one pack are computed while the next one denoises.

    Raises:
        FloatingPointError: images are not finite.
    """
    plan = components.call_plan
    windows = {group.number: group.window for group in groups}
    by_number = {group.number: group for group in groups}
    keep_from = plan.keep_from(windows.values())
    rolled_out, rewards = Rollout(), []
    for pack in plan.packs(windows):
        # images that are not finite end the run on all ranks together, so that it may restore its best
        with run.phase("rollout"), comm.agreed():
            part = rollout(
                components.policy,
                [by_number[number] for number in pack],
                plan,
                keep_from=keep_from,
                reference_steps=components.algorithm.reference(iteration).steps,
                estimate=components.algorithm.gae_lambda is not None,
            )
        rolled_out.join(part)
        prompts = {number: by_number[number].prompt for number in pack}
        log_probs = None
        if components.algorithm.sharpness:
            log_probs = {number: trajectory.old_log_prob.sum(0) for number, trajectory in part.trajectories.items()}
        rewards.append(components.rewarder.submit(part.images, prompts, log_probs, part.estimates, part.after))
    return rolled_out, rewards


def group_noise(components: Components, iteration: int, purpose: str, group: int) -> NoiseKey:
    """The noise of a group's samples, which are numbered over the whole iteration."""
    ids = torch.tensor(components.groups.sample_ids(group), device=components.policy.device)
    return NoiseKey(noise_key(components.algorithm.seed, iteration, purpose), ids)


def _check_windows(windows: Any, groups: int, stop: int, what: str, *, anchored: bool) -> None:
    """Refuse what a user's schedule may have returned."""
    if not isinstance(windows, list) or not all(isinstance(window, Window) for window in windows):
        raise ValueError(f"{what} returned {windows!r}; return a list of Window(start, stop)")
    if len(windows) != groups:
        raise ValueError(f"{what} returned {len(windows)} windows for {groups} groups; return one each")
    if len({(window.deterministic, window.shared) for window in windows}) > 1:
        raise ValueError(
            f"{what} returned windows of which some are deterministic or shared and others not; let all of an "
            "iteration be alike"
        )
    last = max(window.stop for window in windows)
    if last > stop:
        raise ValueError(f"{what} returned a window to {last}; steps from {stop} are deterministic")
    start = max(window.start for window in windows)
    if start and not anchored and not windows[0].deterministic:
        raise ValueError(
            f"{what} returned a window from {start}, but its needs_anchors is False and pure noise is the start of "
            "step 0 only; let needs_anchors be True, start at 0, or return Window(start, stop, deterministic=True)"
        )
