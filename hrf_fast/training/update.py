"""Update: the optimizer steps of one round of rollouts, shared over the ranks of a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from hrf_fast.distributed import comm
from hrf_fast.engines.base import LossScaleOverflow
from hrf_fast.training.components import Components
from hrf_fast.training.metrics import StepStats
from hrf_fast.training.optimizer_step import optimizer_step
from hrf_fast.training.rollout import Rollout
from hrf_fast.windows.base import Window


def update(
    components: Components,
    rolled_out: Rollout,
    windows: Sequence[Window],
    advantages: Mapping[int, Tensor],
    steps: Sequence[int],
    *,
    iteration: int,
    note: Callable[[str], None],
) -> tuple[list[StepStats], int]:
    """Pass over a round's groups `inner_epochs` times, `groups.per_step` of them to an optimizer step.

    Args:
        windows: of all groups of the iteration; advantages: [B] by group, none for a group that is skipped.
        steps: the numbers of the optimizer steps to make.

    Returns:
        The steps made and the number of those skipped: with such a group, or with a gradient that is not finite.

    Raises:
        FloatingPointError: a gradient is not finite and is not to be skipped; the step was not made, on all ranks.
    """
    made, skipped = [], 0
    for _ in range(components.rules.inner_epochs):
        for step in steps:
            if any(group not in advantages for group in components.groups.of_step(step)):
                skipped += 1
                continue
            try:
                made.append(_step(components, rolled_out, windows, advantages, step, iteration))
            except FloatingPointError as error:
                groups = components.groups.of_step(step)
                named = f"groups {groups[0]} to {groups[-1]}" if len(groups) > 1 else f"group {groups[0]}"
                where = f"iteration {iteration}, {named}"
                # an overflow is part of fp16, whatever the user says of gradients that are not finite
                if not components.rules.skip_not_finite and not isinstance(error, LossScaleOverflow):
                    raise comm.on_all_ranks(FloatingPointError(f"{where}: {error}")) from error
                note(f"{where}: optimizer step skipped: {error}")
                skipped += 1
    return made, skipped


def _step(
    components: Components,
    rolled_out: Rollout,
    windows: Sequence[Window],
    advantages: Mapping[int, Tensor],
    step: int,
    iteration: int,
) -> StepStats:
    groups, plan = components.groups, components.calls
    rank_groups = groups.of_rank(step, groups.rank)
    calls = plan.update(rolled_out.calls, {group: windows[group] for group in rank_groups})
    return optimizer_step(
        components.engine,
        components.policy,
        {group: rolled_out.trajectories[group] for group in rank_groups},
        {group: advantages[group] for group in rank_groups},
        calls,
        components.rules.clips,
        reference=components.rules.reference(iteration),
        pairs=groups.size * sum(len(windows[group]) for group in groups.of_step(step)),
        padding=_padding(components, windows, step) if all(call.prediction is None for call in calls) else 0,
        measure=plan.halves,
    )


def _padding(components: Components, windows: Sequence[Window], step: int) -> int:
    """Forwards that the busiest rank makes beyond this one's in an optimizer step, where ranks wait for each other."""
    groups, plan = components.groups, components.calls
    if not components.engine.lockstep:
        return 0
    counts = [
        len(plan.replay({group: windows[group] for group in groups.of_rank(step, rank)}))
        for rank in range(groups.ranks)
    ]
    return max(counts) - counts[groups.rank]
