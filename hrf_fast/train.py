"""Train: config -> components -> loop -> run folder. The file to open first.

    deepspeed hrf_fast/train.py --config configs/smoke_cpu.yaml train.iterations=3

DDPO, HRF and HRF-D are one loop; they differ in the window schedule. In training/, iteration.py
has the order of an iteration, collect.py makes groups, rollout.py denoises them, update.py learns from them.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # a launcher puts this folder first on the path, where our packages would hide a user's module `rewards` or `config`
    own_folder = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") != own_folder]

from collections.abc import Callable, Sequence
from contextlib import closing
from types import ModuleType
from typing import Any

from hrf_fast.assembly.components import build_components
from hrf_fast.command import RESUMES, run_command
from hrf_fast.config.load import checked, load_config
from hrf_fast.config.options import Config
from hrf_fast.distributed import comm
from hrf_fast.run.listeners import Listener, check_listeners
from hrf_fast.run.result import RunResult
from hrf_fast.run.session import Run
from hrf_fast.stopping import Budget
from hrf_fast.training.compile_graphs import compile_graphs
from hrf_fast.training.components import Components
from hrf_fast.training.iteration import iterate
from hrf_fast.training.self_check import self_check


def train(
    config: Config,
    *,
    reward: str | Callable[..., Any] | None = None,
    schedule: str | Callable[..., Any] | None = None,
    listeners: Sequence[Listener] = (),
) -> RunResult:
    """Fine-tune, resume or extend the run that `config` describes, on all ranks of the job.

    Args:
        reward: instead of the configuration's: a name, or a callable `(images [B, 3, H, W] in [0, 1], prompts) -> [B]`.
        schedule: as the reward: a name, or a factory as `register_schedule` takes. Another name gets no kwargs.
        listeners: hear of every iteration and panel, and may end the run; on the main rank.

    Raises:
        TypeError, ValueError: an argument or option can't work; nothing has run. KeyboardInterrupt: Ctrl-C, saved.
        RewardError, FloatingPointError: a reward or a gradient is not finite; no step was made of it.
        UserCodeError: a reward (RewardError is one), a schedule or a listener failed; the message says where.
    """
    listeners = check_listeners(listeners)
    with comm.job(checked(config).run.lost_after):
        return train_components(*build_components(config, reward=reward, schedule=schedule), listeners)


def train_components(config: Config, components: Components, listeners: Sequence[Listener] = ()) -> RunResult:
    """Train what `build_components` made, inside `comm.job()`; for callers that watch the parts while they train."""
    with closing(components.rewarder), Run(config, listeners) as run:
        budget = Budget(config.train.iterations, config.stop.max_evaluations)
        with run.saving_on_error(components.engine):
            done = _resume(components, run, budget)
            reason = run.reason_of(lambda: _loop(components, run, done, budget))
        return run.finish(components.policy, components.engine, reason)


def _resume(components: Components, run: Run, budget: Budget) -> int:
    """Restore the newest checkpoint and get ready to train; returns how many iterations are done."""
    done = components.restore(run.load(components.engine, components.sources))
    run.begin(done, components.sources)
    run.commit(components.state(done))
    with components.engine.gathered():
        compile_graphs(components, run.note)
        for line in (self_check(components), *components.notes):
            run.note(line)
    unit, total = budget.unit
    run.progress.start(unit, done if unit == "iterations" else components.policy.calls.evaluations, total)
    return done


def _loop(components: Components, run: Run, done: int, budget: Budget) -> str:
    """Iterate until the budget, a rule or a listener ends the run; returns the reason."""
    end = run.ending()
    while True:
        end = end or budget.reached(done, components.policy.calls.evaluations)
        if (panel := _due(run.config.evaluation.every, done, end)) and not run.has_panel(done):
            end = run.log_panel(done, components.policy.calls.evaluations, components.evaluate_panel()) or end
        if _due(run.config.run.save_every, done, end) or (panel and run.keeps_best and run.best() == done):
            run.save(components.engine)
        if end:
            run.note(components.algorithm.lr_warmup_note(done))
            return end
        end = iterate(components, run, done)
        done += 1


def _due(every: int, done: int, end: str | None) -> bool:
    return end is not None or done == 0 or (every > 0 and done % every == 0)


class _Module(ModuleType):
    # the import of this module puts it where the package has its function of that name
    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _Module


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of training; returns the exit code."""
    return run_command(lambda: train(load_config(sys.argv[1:] if argv is None else argv)), RESUMES)


if __name__ == "__main__":
    sys.exit(main())
