"""Train: config -> parts -> loop -> run folder. The file to open first.

    deepspeed hrf_fast/train.py --config configs/smoke_cpu.yaml train.iterations=3

DDPO, HRF and HRF-D are one loop; they differ in the window schedule. What an iteration does is in iteration.py: how its
groups are made in collect.py, how a group is denoised in rollout.py, how groups are learnt from in update.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hrf_fast.build import build_parts
from hrf_fast.command import RESUMES, run_command
from hrf_fast.config.load import load_config
from hrf_fast.config.options import Config
from hrf_fast.config.rules import check_job
from hrf_fast.devices import peak_memory_bytes
from hrf_fast.distributed import comm
from hrf_fast.engines.optimizers import learning_rate_at
from hrf_fast.noise import seed_everything
from hrf_fast.policies.network import UNetCalls
from hrf_fast.run.checkpoint import load_newest
from hrf_fast.run.folder import Run
from hrf_fast.training.components import Parts
from hrf_fast.training.iteration import iterate
from hrf_fast.training.metrics import iteration_record
from hrf_fast.training.self_check import self_check
from hrf_fast.training.warm_up import warm_up
from hrf_fast.windows.schedules import load_schedule_state, schedule_state


def train(config: Config) -> Path:
    """Fine-tune, resume or extend the run that `config` describes, on all ranks of the job; returns its folder.

    Raises:
        ValueError: the configuration can't work; nothing has run.
        RewardError, FloatingPointError: a reward or a gradient is not finite; no step was made of it.
        KeyboardInterrupt: Ctrl-C, after a checkpoint.
    """
    with comm.job():
        with comm.agreed():
            check_job(config, comm.world_size())
        return _train(config)


def _train(config: Config) -> Path:
    parts = build_parts(config)
    policy, engine = parts.policy, parts.engine
    iterations, budget = config.train.iterations, config.stop.max_evaluations
    peak, warmup = config.optimizer.learning_rate, config.optimizer.warmup_iterations
    schedule = config.optimizer.learning_rate_schedule
    rate = learning_rate_at(schedule, peak=peak, warmup_iterations=warmup, iterations=iterations)
    with Run(config) as run, closing(parts.background):
        state = load_newest(run.checkpoints, engine, warn=run.progress.note)
        done = state["iteration"] if state else 0
        policy.calls = UNetCalls(**state["calls"]) if state else UNetCalls()
        load_schedule_state(parts.schedule, state or {})
        run.begin(done)
        before = replace(policy.calls)
        run.commit(_state(parts, done))
        with engine.gathered():
            warm_up(policy, config, run.progress.note)
            run.progress.note(self_check(parts, config))
        if parts.activations.reason:
            run.progress.note(parts.activations.reason)
        unit = ("evaluations", policy.calls.evaluations, budget) if budget else ("iterations", done, iterations)
        run.progress.start(*unit)
        try:
            while True:
                finished = done >= iterations or 0 < budget <= policy.calls.evaluations
                if _due(config.evaluation.every, done, finished) and not run.has_panel(done):
                    run.log_panel(done, parts.evaluate_panel(), {"evaluations": policy.calls.evaluations})
                if _due(config.run.save_every, done, finished) or (config.run.keep_best and run.best() == done):
                    run.save(policy, engine)
                if finished:
                    break
                seed_everything(config.run.seed, done)
                run.begin_iteration()
                policy.stopwatch.restart()
                engine.set_learning_rate(rate(done))
                outcome = iterate(parts, config, run, done)
                run.check_spread(done, outcome.scores.advantages.values())
                policy.calls = policy.calls.of_all_ranks(before)
                counters = _counters(parts, done + 1, rate(done)) | {"skipped_steps": outcome.skipped}
                record = iteration_record(outcome.steps, outcome.scores, outcome.windows, counters)
                run.log(done, record, unet_seconds=policy.stopwatch.restart())
                done += 1
                before = replace(policy.calls)
                run.commit(_state(parts, done))
        except BaseException as error:
            # keep what was learnt, unless an update was cut in half, the disk is full, the weights have diverged, or
            # other ranks are not here to save with
            together = comm.world_size() == 1 or comm.said_by_main(error)
            if together and not isinstance(error, (OSError, FloatingPointError)):
                run.save(policy, engine)
            raise
        with engine.gathered(ema=True):
            run.save_model(policy)
    return run.folder


def _state(parts: Parts, done: int) -> dict[str, Any]:
    """What a checkpoint after `done` iterations holds beside the weights and the optimizer."""
    return {"iteration": done, "calls": asdict(parts.policy.calls), **schedule_state(parts.schedule)}


def _counters(parts: Parts, done: int, learning_rate: float) -> dict[str, Any]:
    """Totals of all ranks."""
    policy, train = parts.policy, parts.config.train
    return {
        "learning_rate": learning_rate,
        "images": done * train.groups_per_iteration * train.group_size,
        **asdict(policy.calls),
        "evaluations": policy.calls.evaluations,
        "peak_memory_bytes": max(comm.gather(peak_memory_bytes(policy.device))),
    }


def _due(every: int, done: int, finished: bool) -> bool:
    return finished or done == 0 or (every > 0 and done % every == 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of training; returns the exit code."""
    return run_command(lambda: train(load_config(sys.argv[1:] if argv is None else argv)), RESUMES)


if __name__ == "__main__":
    sys.exit(main())
