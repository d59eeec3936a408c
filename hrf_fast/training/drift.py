"""Drift: how far an iteration's last optimizer step has moved the policy, on samples that the step learnt from.

A rollout is learnt from once by default, so the ratio and the KL of the update are those before the step: 1 and 0
whatever the learning rate is. One more network call shows what the step did before the next panel does.
"""

from __future__ import annotations

from collections.abc import Sequence

from hrf_fast.distributed import comm
from hrf_fast.training.components import Components
from hrf_fast.training.optimizer_step import replay_ratios
from hrf_fast.training.rollout import Rollout
from hrf_fast.windows.base import Window


def policy_drift(components: Components, rolled_out: Rollout, windows: Sequence[Window], step: int) -> float:
    """The drift of an optimizer step, equal on all ranks.

    The step in the middle of the last group's window is made again, without gradient. It is not counted, as the calls
    of panels are not.

    Args:
        windows: of all groups of the iteration; step: the number of the optimizer step.

    Returns:
        Largest |log ratio| of that step's samples under the new weights, in nats per pixel; inf where a ratio
        is NaN.
    """
    group, drift = components.groups.of_step(step)[-1], 0.0
    with components.policy.uncounted(), components.engine.gathered():
        if group in rolled_out.trajectories:
            middle = (windows[group].start + windows[group].stop) // 2
            calls = components.call_plan.replay({group: Window(middle, middle + 1)})
            ratios = replay_ratios(components.policy, rolled_out.trajectories, calls)
            drift = float(ratios.log().abs().max())
    return comm.largest(drift)


def check_drift(drift: float, limit: float, iteration: int) -> None:
    """Raise FloatingPointError, on all ranks alike, where a step has drifted by more than `limit`; 0 is no limit."""
    if 0 < limit < drift:
        raise comm.on_all_ranks(
            FloatingPointError(
                f"iteration {iteration}: its last optimizer step changed the log-prob of its own samples by "
                f"{drift:.2g} nats per pixel, and stop.max_drift is {limit:g}: the step has wrecked the model. Nothing "
                "of this iteration is saved; use a lower optimizer.learning_rate or optimizer.warmup_iterations, in a "
                "new run.folder"
            )
        )
