"""Renamed: options of earlier versions, so that an old name answers with the new one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

RENAMED = {
    "model.attention": "compute.attention",
    "sample.batch_size": "compute.images_per_call",
    "train.optimizer": "optimizer.name",
    "train.learning_rate": "optimizer.learning_rate",
    "train.learning_rate_schedule": "optimizer.learning_rate_schedule",
    "train.warmup_iterations": "optimizer.warmup_iterations",
    "train.weight_decay": "optimizer.weight_decay",
    "train.adam_betas": "optimizer.kwargs.betas",
    "train.adam_eps": "optimizer.kwargs.eps",
    "train.max_grad_norm": "optimizer.max_grad_norm",
    "train.ema_decay": "optimizer.ema_decay",
    "train.micro_batch_size": "compute.images_per_call",
    "train.steps_per_forward": "compute.images_per_call",
    "train.max_batch": "compute.images_per_call",
    "train.precision": "compute.precision",
    "train.activations": "compute.activations",
    "train.memory_budget": "compute.memory_budget",
    "train.channels_last": "compute.channels_last",
    "train.compile": "compute.compile",
    "train.on_nan": "stop.on_nan",
    "train.max_evaluations": "stop.max_evaluations",
    "evaluation.scorer": "evaluation.network",
}
"""The new name of an option."""
GONE = {
    "reward.background": "rewards are always computed in a thread beside the next rollout",
    "train.kernels": "set the environment variable HRF_KERNELS to auto, eager or triton",
    "train.tf32": "use compute.deterministic, whose false allows TF32",
    "train.cudnn_benchmark": "use compute.deterministic, whose false lets cudnn time its convolutions",
    "train.self_check": "the self-check always warns",
    "evaluation.grid_size": "grids show the first 64 images of the panel",
    "evaluation.resamples": "intervals come from 1000 resamples",
}
"""The way out for an option that is gone."""


def refuse_old_names(values: Mapping[Any, Any], source: str) -> None:
    """Refuse options of earlier versions, all of them in one message.

    Args:
        values: a mapping of sections as it was read.
        source: the file or the word that `values` come from.

    Raises:
        ValueError: names every old option with its new name or its way out.
    """
    answers = [answer for name in _names(values) if (answer := _answer(name))]
    if answers:
        raise ValueError(f"{source}: {'; '.join(answers)}")


def _names(values: Mapping[Any, Any]) -> Iterable[str]:
    sections = ((section, options) for section, options in values.items() if isinstance(options, dict))
    return (f"{section}.{name}" for section, options in sections for name in options)


def _answer(name: str) -> str:
    """A sentence for an old name; empty for a current one."""
    if name in RENAMED:
        return f"{name} is now {RENAMED[name]}"
    return f"{name} is gone: {GONE[name]}" if name in GONE else ""
