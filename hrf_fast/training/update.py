"""Update: the optimizer steps of one round of rollouts, shared over the ranks of a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from hrf_fast.distributed import comm
from hrf_fast.engines.base import LossScaleOverflow
from hrf_fast.training.calls import Call
from hrf_fast.training.components import Components
from hrf_fast.training.metrics import StepStats
from hrf_fast.training.optimizer_step import optimizer_step
from hrf_fast.training.rollout import Rollout
from hrf_fast.training.thinning import draw_offsets
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
        windows: of all groups of the iteration; advantages: [B] or [S, B] by group, none for a group that is skipped.
        steps: the numbers of the optimizer steps to make.

    Returns:
        The steps made and the number of those skipped: with such a group, or with a gradient that is not finite.

    Raises:
        FloatingPointError: a gradient is not finite and is not to be skipped; the step was not made, on all ranks.
    """
    made, skipped = [], 0
    algorithm = components.algorithm
    offsets = draw_offsets(algorithm.seed, iteration, algorithm.inner_epochs, components.groups.num_steps)
    for epoch in range(algorithm.inner_epochs):
        for step in steps:
            if any(group not in advantages for group in components.groups.of_step(step)):
                skipped += 1
                continue
            try:
                made.append(_step(components, rolled_out, windows, advantages, step, iteration, offsets[epoch][step]))
            except FloatingPointError as error:
                groups = components.groups.of_step(step)
                named = f"groups {groups[0]} to {groups[-1]}" if len(groups) > 1 else f"group {groups[0]}"
                where = f"iteration {iteration}, {named}"
                # an overflow is part of fp16, whatever the user says of gradients that are not finite
                if not components.algorithm.skip_not_finite and not isinstance(error, LossScaleOverflow):
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
    offset: float,
) -> StepStats:
    groups, plan = components.groups, components.call_plan
    rank_groups = groups.of_rank(step, groups.rank)
    calls: Sequence[Call] = plan.update(rolled_out.calls, {group: windows[group] for group in rank_groups})
    pairs, factor, thinning = groups.size * sum(len(windows[g]) for g in groups.of_step(step)), 1.0, None
    if components.algorithm.thinning.active:
        thin, flat = components.algorithm.thinning.thin, list[int]()
        if components.algorithm.thinning.skip_flat:
            flat = [group for group in groups.of_step(step) if not advantages[group].any()]
        thinning = partial(thin, offset=offset, steps_per_call=plan.steps_per_call, flat=flat)
        calls, factor = thinning(calls)
        pairs = sum(
            call.images for rank in range(groups.ranks) for call in _replay(components, windows, step, rank, thinning)
        )
    return optimizer_step(
        components.engine,
        components.policy,
        {group: rolled_out.trajectories[group] for group in rank_groups},
        {group: advantages[group] for group in rank_groups},
        calls,
        components.algorithm.clips,
        reference=components.algorithm.reference(iteration),
        pairs=pairs,
        padding=_padding(components, windows, step, thinning) if all(call.prediction is None for call in calls) else 0,
        measure=plan.halves,
        factor=factor,
    )


Thin = Callable[[Sequence[Call]], tuple[list[Call], float]]


def _replay(
    components: Components, windows: Sequence[Window], step: int, rank: int, thinning: Thin | None
) -> list[Call]:
    """The calls that a rank makes in an optimizer step which replays."""
    calls = components.call_plan.replay({group: windows[group] for group in components.groups.of_rank(step, rank)})
    return thinning(calls)[0] if thinning else calls


def _padding(components: Components, windows: Sequence[Window], step: int, thinning: Thin | None) -> int:
    """Forwards that the busiest rank makes beyond this one's in an optimizer step, where ranks wait for each other."""
    groups = components.groups
    if not components.engine.lockstep:
        return 0
    counts = [len(_replay(components, windows, step, rank, thinning)) for rank in range(groups.ranks)]
    return max(counts) - counts[groups.rank]
