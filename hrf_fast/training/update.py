"""Learn: an iteration's optimizer steps, shared over the ranks of a job.

An optimizer step averages over `groups_per_step` groups, of which every rank rolls out and learns from as many. Group,
sample and noise numbers are those of one process, so any number of ranks computes the same numbers, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hrf_fast.config.options import Config
from hrf_fast.distributed import comm
from hrf_fast.engines.base import LossScaleOverflow
from hrf_fast.training.calls import Call, packs_of, replay_calls, rollout_calls
from hrf_fast.training.components import Parts
from hrf_fast.training.metrics import StepStats
from hrf_fast.training.optimizer_step import Clips, update
from hrf_fast.training.trajectory import Trajectory
from hrf_fast.windows.base import Window


def groups_of(rank: int, step: int, groups_per_step: int) -> range:
    """The groups of an iteration's optimizer step `step` that `rank` holds."""
    share = groups_per_step // comm.world_size()
    first = step * groups_per_step + rank * share
    return range(first, first + share)


def own_groups(config: Config) -> list[int]:
    """The groups of an iteration that this rank rolls out and learns from, in the order of its optimizer steps."""
    per_step = config.train.groups_per_step
    steps = range(config.train.groups_per_iteration // per_step)
    return [group for step in steps for group in groups_of(comm.rank(), step, per_step)]


@dataclass
class Batch:
    """What this rank has rolled out together: all of an iteration's groups, or those of one optimizer step."""

    trajectories: dict[int, Trajectory]
    """By group."""
    calls: list[Call]
    """The UNet calls inside the windows, with the outputs that were kept."""


def learn(
    parts: Parts,
    config: Config,
    batch: Batch,
    windows: Sequence[Window],
    advantages: Mapping[int, Tensor | None],
    steps: Sequence[int],
    *,
    iteration: int,
    note: Callable[[str], None],
) -> tuple[list[StepStats], int]:
    """Inner epochs over a batch's groups, `groups_per_step` of them to an optimizer step.

    Args:
        windows: of all groups of the iteration; advantages: by group, None for one whose rewards are not finite.
        steps: the numbers of the optimizer steps to make.

    Returns:
        The steps made and the number of those skipped: with such a group, or with a gradient that is not finite.
    """
    train, made, skipped = config.train, [], 0
    clips = Clips(train.clip_range, train.advantage_clip, train.scale_clips_by_window)
    for _ in range(train.inner_epochs):
        for step in steps:
            first = step * train.groups_per_step
            together = range(first, first + train.groups_per_step)
            if any(advantages[group] is None for group in together):
                skipped += 1
                continue
            own = groups_of(comm.rank(), step, train.groups_per_step)
            calls = calls_of(config, batch, {group: windows[group] for group in own})
            replayed = all(call.output is None for call in calls)
            try:
                stats = update(
                    parts.engine,
                    parts.policy,
                    {group: batch.trajectories[group] for group in own},
                    {group: a for group in own if (a := advantages[group]) is not None},
                    calls,
                    clips,
                    pairs=train.group_size * sum(len(windows[group]) for group in together),
                    forwards=_most_replays(config, step, windows) if parts.engine.lockstep and replayed else 0,
                )
            except FloatingPointError as error:
                groups = f"groups {first} to {together[-1]}" if len(together) > 1 else f"group {first}"
                where = f"iteration {iteration}, {groups}"
                if config.stop.on_nan == "stop" and not isinstance(error, LossScaleOverflow):
                    raise comm.on_all_ranks(FloatingPointError(f"{where}: {error}")) from error
                note(f"{where}: optimizer step skipped: {error}")
                skipped += 1
            else:
                made.append(stats)
    return made, skipped


def calls_of(config: Config, batch: Batch, windows: dict[int, Window]) -> list[Call]:
    """Which UNet calls an optimizer step consists of: what the rollout kept, and the rest replayed."""
    if config.train.order == "collect":
        return replays(config, windows)
    if config.compute.steps_per_forward == 1:
        return batch.calls
    kept = [call for call in batch.calls if call.output is not None]
    if not kept:
        return replays(config, windows)
    first = min(call.steps.start for call in kept)
    before = {g: Window(w.start, min(w.stop, first)) for g, w in windows.items() if w.start < first}
    return [*replays(config, before), *kept]


def replays(config: Config, windows: dict[int, Window]) -> list[Call]:
    """The UNet calls that replay windows: those of the rollout in the order on_policy, else group by group."""
    train, compute = config.train, config.compute
    split = _split(config)
    if train.order == "collect" or compute.steps_per_forward > 1:
        del split["max_batch"]
        return replay_calls(windows, steps_per_forward=compute.steps_per_forward, **split)
    last = max(window.stop for window in windows.values())
    packs = packs_of(windows, train.group_size, compute.max_batch)
    calls = [call for pack in packs for call in rollout_calls(pack, num_steps=last, **split)]
    return [call for call in calls if call.inside]


def _split(config: Config) -> dict[str, int]:
    """How rollouts are split into UNet calls."""
    micro, most = config.samples_per_call, config.compute.max_batch
    return {"group_size": config.train.group_size, "micro_batch_size": micro, "max_batch": most}


def _most_replays(config: Config, step: int, windows: Sequence[Window]) -> int:
    """How many forwards the rank that replays most makes in an optimizer step."""
    counts = []
    for rank in range(comm.world_size()):
        own = groups_of(rank, step, config.train.groups_per_step)
        counts.append(len(replays(config, {group: windows[group] for group in own})))
    return max(counts)
