"""Learn: an iteration's optimizer steps, shared over the ranks of a job.

An optimizer step averages over `groups_per_step` groups, of which every rank rolls out and learns from as many. Group,
sample and noise numbers are those of one process, so any number of ranks computes the same numbers, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from hrf_fast import comm
from hrf_fast.engine import LossScaleOverflow
from hrf_fast.metrics import StepStats
from hrf_fast.options import Config
from hrf_fast.parts import Parts
from hrf_fast.trajectory import Trajectory, Window
from hrf_fast.update import forwards_of, update


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


def learn(
    parts: Parts,
    config: Config,
    trajectories: dict[int, Trajectory],
    windows: Sequence[Window],
    advantages: Sequence[Tensor | None],
    *,
    iteration: int,
    note: Callable[[str], None],
) -> tuple[list[StepStats], int]:
    """Inner epochs over the groups, `groups_per_step` of them to an optimizer step.

    Args:
        trajectories: by group, those of this rank; windows, advantages: of all groups, None for one whose rewards are
            not finite.

    Returns:
        The steps made and the number of those skipped: with such a group, or with a gradient that is not finite.
    """
    train, steps, skipped = config.train, [], 0
    micro_batch_size = train.micro_batch_size or train.group_size

    def forwards(group: int) -> int:
        return forwards_of(windows[group], train.group_size, micro_batch_size, train.steps_per_forward)

    for _ in range(train.inner_epochs):
        for step in range(train.groups_per_iteration // train.groups_per_step):
            first = step * train.groups_per_step
            together = range(first, first + train.groups_per_step)
            if any(advantages[group] is None for group in together):
                skipped += 1
                continue
            own = groups_of(comm.rank(), step, train.groups_per_step)
            ranks = [groups_of(rank, step, train.groups_per_step) for rank in range(comm.world_size())]
            try:
                stats = update(
                    parts.engine,
                    parts.policy,
                    [trajectories[group] for group in own],
                    [a for group in own if (a := advantages[group]) is not None],
                    clip_range=train.clip_range,
                    advantage_clip=train.advantage_clip,
                    scale_clips_by_window=train.scale_clips_by_window,
                    micro_batch_size=micro_batch_size,
                    steps_per_forward=train.steps_per_forward,
                    pairs=train.group_size * sum(len(windows[group]) for group in together),
                    forwards=max(sum(map(forwards, share)) for share in ranks) if parts.engine.lockstep else 0,
                )
            except FloatingPointError as error:
                groups = f"groups {first} to {together[-1]}" if len(together) > 1 else f"group {first}"
                where = f"iteration {iteration}, {groups}"
                if train.on_nan == "stop" and not isinstance(error, LossScaleOverflow):
                    raise comm.on_all_ranks(FloatingPointError(f"{where}: {error}")) from error
                note(f"{where}: optimizer step skipped: {error}")
                skipped += 1
            else:
                steps.append(stats)
    return steps, skipped
