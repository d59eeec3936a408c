"""Notes on a configuration translated from TRL: what was assumed, what was left out, and what is not as in TRL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hrf_fast.from_trl.fields import ASKED_FOR, DECIDED, DEFAULTS, HEAD, KNOWN, LEFT_OUT, MOVED
from hrf_fast.from_trl.source import TrlRun

UNNAMED = "my_module:my_reward"
"""Stands for a reward of TRL's that could not be named; `hrf train` refuses it, since there is no my_module."""
NETWORK = "openai/clip-vit-base-patch32"
"""Network of the panels."""


@dataclass(frozen=True)
class Numbers:
    """Sizes of TRL's run."""

    samples: int
    """Samples of an epoch, over all processes."""
    per_step: int
    """Samples of an optimizer step, over all processes."""
    processes: int | None
    """Processes that TRL was launched on; None if that is not known."""


def write_notes(run: TrlRun, values: Mapping[str, Any], options: Mapping[str, Any], numbers: Numbers) -> list[str]:
    """One text for each note.

    Args:
        values: every field of DEFAULTS, with its default where the source has none.
        options: what they became, by "section.field".
    """
    return [
        *_names(run),
        *_assumed(run, options, numbers.processes),
        *_left_out(run, values),
        *_unlike_trl(values, numbers),
    ]


def _names(run: TrlRun) -> Iterator[str]:
    """The reward and the prompts, where the source does not name them."""
    if run.reward is None:
        written = f"TRL's reward is {run.reward_text}, which" if run.reward_text else "the source names no reward: it"
        yield (
            f"reward.name: {written} could not be translated, and `hrf train` refuses {UNNAMED}; name the function as "
            "module:function, or an object with __call__ that the module holds, or a reward of `hrf rewards`"
        )
    if run.prompts is None:
        yield (
            "prompts.source: TRL's prompt_fn could not be named; animals is the list of TRL's example; name another "
            "list, a file or module:function"
        )


def _assumed(run: TrlRun, options: Mapping[str, Any], processes: int | None) -> Iterator[str]:
    """Defaults of TRL that take the place of what the source computes or leaves out."""
    for name, value in DEFAULTS.items():
        if name in run.computed:
            reason = f"{name} is {run.computed[name]} in the script, which was not run"
        elif name in ASKED_FOR and name not in run.fields:
            reason = f"{name} is not in the source"
        else:
            continue
        way_out = _to_set(DECIDED[name], options) if name in DECIDED else "check it"
        yield f"{reason}: taken as {value!r}, TRL's default; {way_out}"
    if processes is None:
        way_out = _to_set(("train.groups_per_iteration", "train.groups_per_step"), options)
        yield f"TRL's number of processes is not in the source: taken as 1; give --processes, or {way_out}"


def _to_set(names: Sequence[str], options: Mapping[str, Any]) -> str:
    """The advice to set options, with their values."""
    listed = [f"{name} (now {json.dumps(options[name])})" if name in options else name for name in names]
    return f"if that is wrong, set {' and '.join(listed)}"


def _left_out(run: TrlRun, values: Mapping[str, Any]) -> Iterator[str]:
    """Fields and arguments that became no option."""
    written = run.computed | {name: repr(value) for name, value in run.fields.items()}
    if run.reward == "aesthetic":
        # they are in reward.kwargs.head
        written = {name: text for name, text in written.items() if name not in HEAD or name in run.computed}
    if not values["per_prompt_stat_tracking"]:
        for name in ("per_prompt_stat_tracking_buffer_size", "per_prompt_stat_tracking_min_count"):
            if name in written:
                yield f"{name} {written[name]}: left out; it acts with per_prompt_stat_tracking only, as in TRL"
    for names, reason in LEFT_OUT.items():
        if listed := [f"{name} {written[name]}" for name in names if name in written]:
            yield f"{', '.join(listed)}: left out; {reason}"
    for name in sorted(run.declared - KNOWN):
        if name in written:
            yield f"{name} {written[name]}: left out; it is an argument of the script's own"
    yield from run.unread


def _unlike_trl(values: Mapping[str, Any], numbers: Numbers) -> Iterator[str]:
    """Differences between TRL's run and the one here."""
    yield (
        f"evaluation.network: {NETWORK} gives panels their Vendi Score, since hrf_fast is about the diversity that a "
        "reward costs; it is a download of 0.6 GB, and none does without"
    )
    if values["train_timestep_fraction"] != 1:
        yield (
            f"train_timestep_fraction {values['train_timestep_fraction']}: TRL draws that share of the steps for each "
            "sample, train.step_share evenly spaced ones from a random first; the expected gradient is the same"
        )
    if not values["train_cfg"] and values["sample_guidance_scale"] > 1:
        yield (
            "train_cfg false: TRL samples with guidance and trains without, so its ratio is not 1 on policy; "
            "train.guidance=false leaves guidance out of both, and panels keep it"
        )
    if values["negative_prompts"] and values["sample_guidance_scale"] <= 1:
        yield "negative_prompts: left out; a guidance scale of at most 1 does not use it"
    if mirror := MOVED.get(values["pretrained_model"]):
        yield f"model.name: {mirror} takes the place of {values['pretrained_model']}, which is deprecated"
    if numbers.samples % numbers.per_step:
        yield (
            f"{numbers.samples} samples an epoch are no multiple of {numbers.per_step} per optimizer step, which TRL "
            "refuses as hrf_fast does: change train.groups_per_step"
        )
    if values["resume_from"]:
        yield "resume_from: the same `hrf train` command resumes its own run; TRL's checkpoints can't be read"
    if values["push_to_hub"]:
        yield "push_to_hub: upload the run's model/ folder, which has a card, with `hf upload`"
