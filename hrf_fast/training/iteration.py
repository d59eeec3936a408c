"""Iteration: anchors and windows, then rollout, reward and update, in the order that train.order says.

`collect`, as published, rolls out all groups and then makes its optimizer steps, the later ones slightly off-policy;
`on_policy` rolls out the groups of one optimizer step at a time, so that every step learns from the current policy.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from hrf_fast.devices import peak_memory_bytes
from hrf_fast.distributed import comm
from hrf_fast.noise import seed_everything
from hrf_fast.registry import qualified_name
from hrf_fast.rewards import RewardError
from hrf_fast.run.session import Run
from hrf_fast.training.collect import begin, collect
from hrf_fast.training.components import Components
from hrf_fast.training.credit import spread_notes, standardise
from hrf_fast.training.drift import check_drift, policy_drift
from hrf_fast.training.metrics import StepStats, iteration_record
from hrf_fast.training.rewarding import GroupRewards, gather_rewards
from hrf_fast.training.update import update
from hrf_fast.user_code import forgets, memory_of
from hrf_fast.windows.base import Window


@dataclass
class Outcome:
    """Results of an iteration, over all ranks."""

    windows: list[Window]
    """One per group."""
    rewards: dict[int, GroupRewards] = field(default_factory=dict)
    """By group."""
    advantages: dict[int, Tensor] = field(default_factory=dict)
    """[B] or [S, B] by group; a skipped group has none."""
    steps: list[StepStats] = field(default_factory=list)
    """One per optimizer step that was made."""
    skipped: int = 0
    """Optimizer steps that were not made."""
    drift: float = 0.0
    """Largest |log ratio| after the last optimizer step, in nats per pixel, on samples of that step."""


def iterate(components: Components, run: Run, iteration: int) -> str | None:
    """Run one iteration and log it.

    Returns:
        A listener's reason to end the run.

    Raises:
        RewardError, FloatingPointError: a reward or a gradient is not finite; no step was made of it.
    """
    policy, groups = components.policy, components.groups
    before = replace(policy.calls)
    # a user's reward or schedule may draw from the global generators
    seed_everything(components.algorithm.seed, iteration)
    run.begin_iteration()
    policy.stopwatch.restart()
    outcome = learn(components, run, iteration)
    policy.calls = policy.calls.of_all_ranks(before)
    if outcome.advantages and not any(bool(values.any()) for values in outcome.advantages.values()):
        run.note_once(
            f"iteration {iteration}: reward.name {components.reward.name} is the same for all samples of every group, "
            "so nothing is learnt; use a reward that varies, or a larger train.group_size; where a large offset hides "
            "the differences in fp32, subtract the offset in the reward, or return float64",
            key="no spread",
        )
    for reward in (components.reward, *components.panel.held_out.values()):
        for line in tuple(reward.notes):
            run.note_once(line, key=line)
    numbers = iteration_record(
        outcome.steps,
        outcome.rewards,
        outcome.advantages,
        outcome.windows,
        referred=components.algorithm.reference(iteration).steps > 0,
    )
    noisy = components.noise_scale.add(numbers.get("gradient_signal"), numbers.get("gradient_noise"))
    if noisy:
        run.note_once(f"iteration {iteration}: {noisy}", key="gradient noise")
    record = {
        "iteration": iteration,
        **numbers,
        # JSON has no infinity
        "drift": min(outcome.drift, sys.float_info.max),
        **_counters(components, iteration),
        "skipped_steps": outcome.skipped,
    }
    images = groups.per_iteration * groups.size
    state = components.state(iteration + 1)
    return run.log(record, state, images=images, network_seconds=policy.stopwatch.restart())


def _counters(components: Components, iteration: int) -> dict[str, Any]:
    """Totals of all ranks after an iteration."""
    policy, groups = components.policy, components.groups
    return {
        "learning_rate": components.algorithm.learning_rate(iteration),
        "images": (iteration + 1) * groups.per_iteration * groups.size,
        **asdict(policy.calls),
        "evaluations": policy.calls.evaluations,
        "peak_memory_bytes": max(comm.gather(peak_memory_bytes(policy.device))),
    }


def learn(components: Components, run: Run, iteration: int) -> Outcome:
    """Draw the groups of an iteration, then roll out, reward and update round by round."""
    algorithm, engine, note = components.algorithm, components.engine, run.note
    engine.set_learning_rate(algorithm.learning_rate(iteration))
    with engine.gathered():
        windows, groups = begin(components, run, iteration)
    reference = algorithm.reference(iteration)
    if reference.mean and all(window.start >= reference.mean_steps for window in windows):
        run.note_once(
            f"iteration {iteration}: every window starts after the first {reference.mean_steps} steps, which "
            "remedies.reference_penalty is of, so it does nothing here; where that is so in all iterations, set "
            "remedies.reference_steps to more",
            key="reference penalty",
        )
    outcome = Outcome(windows)
    rounds = components.groups.rounds(components.call_plan.order)
    for steps in rounds:
        rank_groups = [groups[number] for number in components.groups.own(steps)]
        with engine.gathered():
            rolled_out, pending = collect(components, run, rank_groups, iteration)
        with run.phase("reward"):
            rewards = gather_rewards(pending, iteration=iteration, skip_not_finite=algorithm.skip_not_finite)
            # advantages may be the user's
            what = f"train.advantages {qualified_name(components.advantages)}"
            before = memory_of(components.advantages)
            with comm.agreed():
                advantages = standardise(
                    rewards,
                    components.advantages,
                    components.policy.device,
                    sharpness=algorithm.sharpness,
                    gae_lambda=algorithm.gae_lambda,
                    term_weights=components.term_weights,
                )
                weak = spread_notes(rewards, components.advantages, components.term_weights)
            if line := forgets(what, components.advantages, before, "docs/remedies.md"):
                run.note_once(line, key=f"{what}.state")
            for kind, sentence in weak.items():
                run.note_once(f"iteration {iteration}: {sentence}", key=kind)
        outcome.rewards |= rewards
        outcome.advantages |= advantages
        for group in rewards.keys() - advantages.keys():
            problem = rewards[group].problem or "no other sample has a finite reward to compare its own with"
            note(f"iteration {iteration}, group {group}: its optimizer step is skipped: {problem}")
        if steps == rounds[-1] and all(result.rewards is None for result in outcome.rewards.values()):
            raise comm.on_all_ranks(
                RewardError(f"iteration {iteration}: no group has finite rewards, so there is nothing to learn from")
            )
        run.unbroken()
        with run.phase("update"):
            made, skipped = update(components, rolled_out, windows, advantages, steps, iteration=iteration, note=note)
            if steps == rounds[-1]:
                outcome.drift = policy_drift(components, rolled_out, windows, steps[-1])
        outcome.steps += made
        outcome.skipped += skipped
        # graphs of a skipped step are still kept: they must not outlive the next rollout's
        del rolled_out
    check_drift(outcome.drift, algorithm.max_drift, iteration)
    return outcome
