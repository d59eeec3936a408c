"""Configurations of hrf_fast to time against the literal loop, as tables of options."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hrf_fast.cpu import emulation_note
from hrf_fast.run.card import METHODS as NAMES
from hrf_fast.training.calls import SAMPLED_TOGETHER

METHODS = {name.lower().replace("-", "_"): schedule for schedule, name in NAMES.items()}
"""window.schedule of every method: ddpo, hrf, hrf_d."""
# of the published order in the update: steps of a group that share a call
_STEPS_PER_CALL = 8


@dataclass(frozen=True)
class Row:
    """One configuration."""

    name: str
    options: dict[str, Any]
    equal: bool = False
    """Promises the literal loop's weights after a few iterations."""
    kind: str = "ours"
    """ours, or literal for literal.py."""
    tree: Path | None = None
    """The checkout whose code runs it; None for this one."""

    @property
    def words(self) -> list[str]:
        """The options as `hrf train` takes them."""
        return [f"{option}={value}" for option, value in self.options.items()]


LITERAL = Row("literal loop", {}, kind="literal")


def base_words(
    model: str, *, steps: int, groups: int, group_size: int, device: Any, seed: int, schedule: str
) -> list[str]:
    """Options that all rows share: nothing is evaluated, saved or printed on the way.

    The reward is not the size of a JPEG, which jumps by bytes where a pixel is rounded the other way: rows could not be
    held to equal losses. Encoding the images would take a thousandth of an iteration.

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


def method_words(model: str, method: str, arguments: Any) -> list[str]:
    """Options that all rows of a model and a method share.

    Args:
        model: model.name; arguments: steps, groups, group_size, device and seed of the command line.
    """
    names = ("steps", "groups", "group_size", "device", "seed")
    words = base_words(model, schedule=METHODS[method], **{name: getattr(arguments, name) for name in names})
    if method == "hrf":
        half, steps = arguments.steps // 2, arguments.steps
        clusters = [[0, half], [half, steps]]
        if getattr(arguments, "starts", None):
            clusters = [[start, start + 1] for start in arguments.starts]
        # one iteration of each cluster in turn
        words += [
            f"window.kwargs.clusters={clusters}".replace(" ", ""),
            "window.kwargs.iterations_per_cluster=1",
        ]
    return words


def table_of(method: str, words: list[str], arguments: Any) -> list[tuple[Row, list[str]]]:
    """The literal loop and the rows of a method that `arguments.rows` chooses, each with its whole configuration.

    Raises:
        ValueError: --rows chooses none; says what there is.
    """
    known = rows(method, groups=arguments.groups, group_size=arguments.group_size)
    chosen = [row for row in known if any(fnmatch(row.name, pattern) for pattern in arguments.rows)]
    if emulation_note("bf16", str(arguments.device)):
        # emulated, a row would take an hour and say nothing about bf16
        chosen = [row for row in chosen if row.options.get("compute.precision") != "bf16"]
    if not chosen:
        names = "; ".join(row.name for row in known)
        raise ValueError(f"--rows {' '.join(map(repr, arguments.rows))} names none of {method}'s: {names}")
    return [(LITERAL, words), *((row, [*words, *row.words]) for row in chosen)]


def rows(method: str, *, groups: int, group_size: int) -> list[Row]:
    """The configurations of one method.

    Args:
        groups: per iteration; group_size: samples in each.
    """
    exact = {"window.kwargs.search": "exact"} if method == "hrf_d" else {}
    collect = {"train.order": "collect", "compute.activations": "replay", **exact}
    keep = {"train.order": "on_policy", "compute.activations": "keep"}
    # several groups share the calls of a rollout, several steps of a group those of the update
    joined = collect | {"compute.images_per_call": _STEPS_PER_CALL * group_size}
    # the groups of an iteration make one optimizer step and share all calls; a search keeps its calls of 64 images
    together = keep | {
        "train.groups_per_step": groups,
        "compute.images_per_call": max(SAMPLED_TOGETHER, groups * group_size),
    }
    bf16 = {"compute.precision": "bf16", "compute.channels_last": True}
    table = [
        Row("collect, one group and step a call", collect, equal=True),
        Row(f"collect, groups and {_STEPS_PER_CALL} steps a call", joined, equal=True),
        Row("collect, checkpoint", joined | {"compute.activations": "checkpoint"}, equal=True),
        Row("on_policy, keep", keep | exact),
    ]
    if method != "hrf_d":
        return [
            *table,
            Row("on_policy, keep, one step", together),
            Row("on_policy, keep, one step, channels_last", together | {"compute.channels_last": True}),
            Row("on_policy, keep, one step, compile unet", together | {"compute.compile": "unet"}),
            Row(
                "on_policy, keep, one step, channels_last, compile unet",
                together | {"compute.channels_last": True, "compute.compile": "unet"},
            ),
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
