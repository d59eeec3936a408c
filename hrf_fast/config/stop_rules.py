"""Rules of spans and ends: options of `stop` that could never act, and schedules that the end of a run cuts off."""

from __future__ import annotations

from hrf_fast.config.options import Config
from hrf_fast.config.run_options import StopConfig

# of the ratio and what is made of it
_RATIO_LIMITS = ("max_ratio", "max_clip_fraction", "max_kl")


def check_stop(config: Config) -> None:
    """Refuse rules of `stop` that could never act.

    Raises:
        ValueError: names the option, its value and the way out.
    """
    stop, train = config.stop, config.train
    if stop.target_reward is not None and not config.evaluation.every:
        raise ValueError(
            f"stop.target_reward is {stop.target_reward:g} but evaluation.every is 0, so no panel comes before "
            "the end; set evaluation.every, or stop.target_reward=null"
        )
    if stop.patience and not config.evaluation.every:
        raise ValueError(
            f"stop.patience is {stop.patience} panels but evaluation.every is 0, so the only one to compare comes at "
            "the end; set evaluation.every, or stop.patience=0"
        )
    on_policy = train.one_step_a_rollout and train.inner_epochs == 1
    if on_policy and train.clip_steps != "equal":
        raise ValueError(
            f"train.clip_steps is {train.clip_steps}, but every rollout serves one optimizer step, where the ratio is "
            "1 and no clip acts; leave it at equal, or use train.order=collect with several steps an iteration, or "
            "train.inner_epochs above 1"
        )
    for name in _RATIO_LIMITS if on_policy else ():
        if (value := getattr(stop, name)) not in (0, getattr(StopConfig(), name)):
            raise ValueError(
                f"stop.{name} is {value:g}, but every rollout serves one optimizer step, where the ratio is 1 and says "
                "nothing; use stop.max_drift, which measures the step itself, or train.order=collect with several "
                "steps an iteration, or train.inner_epochs above 1"
            )


def spans_note(config: Config) -> str:
    """A line where a schedule spans train.iterations, but the run may end by another budget before."""
    limit = config.stop.max_evaluations
    spans = {
        "optimizer.learning_rate_schedule=cosine": config.optimizer.learning_rate_schedule == "cosine",
        "remedies.kl_weight_end": config.remedies.kl_weight_end is not None,
    }
    named = [option for option, is_set in spans.items() if is_set]
    if not limit or not named:
        return ""
    return (
        f"{' and '.join(named)} {'spans' if len(named) == 1 else 'span'} train.iterations {config.train.iterations}, "
        f"but stop.max_evaluations {limit} may end the run before; set train.iterations to the number that it comes to"
    )
