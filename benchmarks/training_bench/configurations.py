"""Configurations of hrf_fast to time against the literal loop, as tables of options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

METHODS = {"ddpo": "full", "hrf": "clusters", "hrf_d": "dynamic"}


@dataclass(frozen=True)
class Row:
    """One configuration."""

    name: str
    options: dict[str, Any]
    equal: bool = False
    """It must have the literal loop's weights after a few iterations."""
    kind: str = "ours"
    """ours, or literal for benchmarks/training_bench/literal.py."""

    @property
    def words(self) -> list[str]:
        """The options as `hrf train` takes them."""
        return [f"{option}={value}" for option, value in self.options.items()]


LITERAL = Row("literal loop", {}, kind="literal")


def base_words(
    model: str, *, steps: int, groups: int, group_size: int, device: Any, seed: int, schedule: str
) -> list[str]:
    """What all rows share: nothing is evaluated, saved or printed on the way.

    The reward is not the size of a JPEG, which jumps by bytes where a pixel is rounded the other way: rows could not be
    held to equal losses. To encode the images takes a thousandth of an iteration.

    Args:
        model: model.name; steps: T; groups: per iteration; schedule: window.schedule.
    """
    return [
        f"model.name={model}",
        f"sample.num_inference_steps={steps}",
        f"window.schedule={schedule}",
        f"reward.name={__name__}:coarse",
        # never reached: a worker is stopped when it has been measured
        "train.iterations=1000000",
        f"train.groups_per_iteration={groups}",
        f"train.group_size={group_size}",
        "evaluation.every=0",
        "evaluation.panel_size=2",
        "evaluation.network=none",
        "run.save_every=0",
        "run.progress=quiet",
        f"run.device={device}",
        f"run.seed={seed}",
    ]


def coarse(images: Any, prompts: Any = None) -> Any:
    """Brightness in steps that the rounding of an image does not cross."""
    return (images.mean((1, 2, 3)) * 200).round()


def rows(method: str, *, groups: int, group_size: int) -> list[Row]:
    """The table for one method.

    Args:
        groups: per iteration; group_size: samples in each.
    """
    collect = {"train.order": "collect", "compute.activations": "replay"}
    keep = {"train.order": "on_policy", "compute.activations": "keep"}
    # all groups of an iteration make one optimizer step, so that they can share UNet calls
    together = keep | {"train.groups_per_step": groups, "compute.max_batch": groups * group_size}
    bf16 = {"compute.precision": "bf16", "compute.channels_last": True}
    exact = {"window.kwargs.search": "exact"} if method == "hrf_d" else {}
    batched = {"compute.max_batch": groups * group_size, "compute.steps_per_forward": 8}
    table = [
        Row("collect, one group and step a call", collect | exact | {"compute.max_batch": group_size}, equal=True),
        Row(
            "collect, 8 steps a call",
            collect | exact | {"compute.max_batch": group_size, "compute.steps_per_forward": 8},
            equal=True,
        ),
        Row("collect, groups and 8 steps a call", collect | exact | batched, equal=True),
        Row("collect, checkpoint", collect | exact | batched | {"compute.activations": "checkpoint"}, equal=True),
        Row("on_policy, keep", keep | exact | {"compute.max_batch": group_size}),
    ]
    if method != "hrf_d":
        return [
            *table,
            Row("on_policy, keep, one step", together),
            Row("on_policy, keep, one step, channels_last", together | {"compute.channels_last": True}),
            Row("on_policy, keep, one step, compile unet", together | {"compute.compile": "unet"}),
            Row("on_policy, keep, one step, bf16", together | bf16),
            Row("on_policy, keep, one step, bf16, compile unet", together | bf16 | {"compute.compile": "unet"}),
            Row("on_policy, keep, one step, bf16, compile blocks", together | bf16 | {"compute.compile": "blocks"}),
        ]
    for search in ("x0", "bandit"):
        cheap = together | {"window.kwargs.search": search}
        table += [
            Row(f"{search}: on_policy, keep, one step", cheap),
            Row(f"{search}: on_policy, keep, one step, channels_last", cheap | {"compute.channels_last": True}),
            Row(f"{search}: on_policy, keep, one step, bf16", cheap | bf16),
            Row(f"{search}: on_policy, keep, one step, bf16, compile unet", cheap | bf16 | {"compute.compile": "unet"}),
        ]
    return table
