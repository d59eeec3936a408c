"""Iteration: anchors and windows, then rollout, reward and update, in the order that train.order says.

`collect`, as published, rolls out all groups and then makes its optimizer steps, the later ones slightly off-policy;
`on_policy` rolls out the groups of one optimizer step at a time, so that every step learns from the current policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hrf_fast.config.options import Config
from hrf_fast.distributed import comm
from hrf_fast.rewards import RewardError
from hrf_fast.run.folder import Run
from hrf_fast.training.collect import collect, plan
from hrf_fast.training.components import Parts
from hrf_fast.training.metrics import Scores, StepStats
from hrf_fast.training.rewarding import gather_scores
from hrf_fast.training.update import groups_of, learn
from hrf_fast.windows.base import Window


@dataclass(frozen=True)
class Outcome:
    """What an iteration did, over all ranks."""

    steps: list[StepStats]
    skipped: int
    scores: Scores
    windows: list[Window]


def iterate(parts: Parts, config: Config, run: Run, iteration: int) -> Outcome:
    """One iteration.

    Raises:
        RewardError, FloatingPointError: a reward or a gradient is not finite; no step was made of it.
    """
    where: Any = {"iteration": iteration, "note": run.progress.note}
    with parts.engine.gathered():
        planned = plan(parts, config, run, iteration)
    steps: list[StepStats] = []
    scores, skipped = Scores({}, {}, {}), 0
    batches = _batches(config)
    for batch in batches:
        own = [group for step in batch for group in groups_of(comm.rank(), step, config.train.groups_per_step)]
        with parts.engine.gathered():
            rolled_out, pending = collect(parts, config, run, iteration, planned, own)
        with run.phase("reward"):
            new = gather_scores(config, pending, device=parts.policy.device, **where)
        scores = scores.join(new)
        if batch == batches[-1] and not scores.terms:
            raise comm.on_all_ranks(
                RewardError(f"iteration {iteration}: no group has finite rewards, so there is nothing to learn from")
            )
        run.unbroken()
        with run.phase("update"):
            made, lost = learn(parts, config, rolled_out, planned.windows, new.advantages, batch, **where)
        steps += made
        skipped += lost
        # graphs of a skipped step are still kept: they must not outlive the next rollout's
        del rolled_out
    return Outcome(steps, skipped, scores, planned.windows)


def _batches(config: Config) -> list[Sequence[int]]:
    """Which optimizer steps are rolled out together."""
    steps = range(config.train.groups_per_iteration // config.train.groups_per_step)
    return [steps] if config.train.order == "collect" else [[step] for step in steps]
