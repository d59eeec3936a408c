"""Training on the layouts of published models: the loop as published with its own TF32, and ours, in turns.

No row promises the literal loop's weights here, since TF32 and cudnn's fastest convolutions are other roundings;
tests/gpu holds the published order to them without either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench.layouts import write_layout
from benchmarks.training_bench.ceiling import add_utilisation, network_flops
from benchmarks.training_bench.configurations import LITERAL, Row, base_words
from benchmarks.training_bench.turns import measure, note
from hrf_fast.config.load import load_config
from hrf_fast.devices import set_precision_flags
from hrf_fast.memory.planner import RESERVE, plan

# plans are for any memory: what fits is decided here
_ANY = 10**18


@dataclass(frozen=True)
class Layout:
    """One model, and how much of an iteration is measured; windows start at a quarter and at three quarters of T.

    Activations are made again in the update but in one row: a card would not hold those of a whole window.
    """

    kind: str
    title: str
    steps: int
    groups: int
    group_size: int
    lora_rank: int = 0
    tried: float = 0.0
    """Bytes beside a plan's of a row in fp32: what cudnn tries before it has its fastest convolutions in TF32."""

    @property
    def words(self) -> list[str]:
        """Options beside those of every benchmark."""
        # the last step is deterministic, and trained by no loop
        early, late = self.steps // 4, min(3 * self.steps // 4, self.steps - 2)
        words = [f"window.kwargs.clusters=[[{early},{early + 1}],[{late},{late + 1}]]"]
        words += ["window.kwargs.iterations_per_cluster=1"]
        if self.kind != "celebahq":
            words += ["prompts.source=animals", "evaluation.images_per_prompt=1"]
        return words + ([f"lora.rank={self.lora_rank}"] if self.lora_rank else [])


LAYOUTS = {
    "celebahq-256": Layout("celebahq", "DDPM of 113.7 M at 3×256×256", 20, 4, 5, tried=30e9),
    "sd15": Layout("sd15", "Stable Diffusion 1.5, whole UNet, 512 px", 12, 2, 4),
    "sdxl-lora": Layout("sdxl", "SDXL, LoRA of rank 16, 1024 px", 8, 1, 2, lora_rank=16),
}


def rows(layout: Layout, device: torch.device) -> list[Row]:
    """The literal loop, ours as `configs/fast.yaml` has it, less of that, and the published order last.

    The order is that of importance: where memory or time is short, the last rows are left out. bf16 and compile are for
    CUDA.
    """
    cuda = device.type == "cuda"
    tf32 = {"compute.deterministic": False} if cuda else {}
    # calls of a group, as published; without a number the plan would count 64 images where nothing is trained
    published = tf32 | {"compute.images_per_call": layout.group_size}
    ours = tf32 | {"train.order": "on_policy", "train.groups_per_step": layout.groups, "compute.channels_last": True}
    ours |= {"compute.images_per_call": layout.groups * layout.group_size}
    name = "on_policy, one step, channels_last"
    table = [Row("the published loop", published, kind="literal")]
    if cuda:
        bf16 = ours | {"compute.precision": "bf16"} | ({"lora.base_precision": "bf16"} if layout.lora_rank else {})
        fast = bf16 | {"compute.compile": "unet", "compute.activations": "auto"}
        table.append(Row(f"{name}, bf16, compile unet, activations auto", fast))
        table.append(Row(f"{name}, bf16", bf16))
    return [*table, Row(name, ours), Row("published order", published)]


def fitting(
    table: Sequence[tuple[Row, list[str]]], free: int | None, *, tried: float = 0.0
) -> tuple[list[tuple[Row, list[str]]], list[str]]:
    """The rows whose processes fit into `free` bytes side by side, by `hrf plan`, and a sentence for each other one.

    Rows are taken in their order. A row with activations=auto is given a budget: what all rows leave, at most half of
    the card. None is no limit: the main memory of a CPU is not planned for. `tried`: see `Layout`.
    """
    if free is None:
        return list(table), []
    planned = plan(load_config(table[0][1]), gpus=1, memory=_ANY)
    usable = room = free * (1 - RESERVE)
    chosen, left_out = [], []
    for row, words in table:
        compute = load_config(words).compute
        auto = compute.activations == "auto"
        mode = "replay" if auto else compute.activations
        need = planned.need("plain", compute.precision, mode, compute.images_per_call)
        need += tried if compute.precision == "fp32" else 0.0
        if need > room:
            left_out.append(
                f"{row.name}: too little memory: it needs {need / 1e9:.3g} GB, {room / 1e9:.3g} GB are left"
            )
            continue
        chosen.append((row, list(words), need, auto))
        room -= need
    return [
        _with_budget(row, words, min(need + room, max(need, usable / 2))) if auto else (row, words)
        for row, words, need, auto in chosen
    ], left_out


def _with_budget(row: Row, words: list[str], memory: float) -> tuple[Row, list[str]]:
    """A row of activations=auto that plans for so many bytes."""
    # auto leaves a reserve of its own unused
    budget = {"compute.memory_budget": f"{math.ceil(memory / (1 - RESERVE) / 1e6)}MB"}
    row = replace(row, name=f"{row.name} in {memory / 1e9:.3g} GB", options=row.options | budget)
    return row, [*words, *(f"{option}={value}" for option, value in budget.items())]


def measure_layout(
    layout: Layout,
    folder: Path,
    device: torch.device,
    free: int | None,
    *,
    tiny: bool,
    until: float = math.inf,
    rounds: int = 3,
) -> dict[str, Any]:
    """Time a layout's rows in turns.

    Args:
        free: bytes of the card; None for a CPU. tiny: the layout's shape with few channels, and one turn.
        until: the time.monotonic() to be done by.

    Returns:
        The rows as in `hrf bench training`, and what was left out and why.

    Raises:
        OutOfTime: not one round was to be had by then.
    """
    steps, groups, size = (4, 1, 2) if tiny else (layout.steps, layout.groups, layout.group_size)
    shown = {"title": layout.title, "steps": steps, "groups": groups, "group_size": size, "tiny": tiny}
    layout = replace(layout, steps=steps, groups=groups, group_size=size)
    model = write_layout(layout.kind, folder, tiny=tiny)
    words = base_words(model, steps=steps, groups=groups, group_size=size, device=device, seed=0, schedule="clusters")
    words += layout.words
    table, left_out = fitting([(row, [*words, *row.words]) for row in rows(layout, device)], free, tried=layout.tried)
    if not table or table[0][0].kind != LITERAL.kind or len(table) < 2:
        return {**shown, "rows": [], "left_out": left_out, "skipped": "too little memory for this layout"}
    measured = measure(
        table,
        where=layout.kind,
        folder=folder / "workers",
        threads=torch.get_num_threads(),
        rounds=1 if tiny else rounds,
        per_round=2,
        images=groups * size,
        clock="wall",
        # ten minutes in silence would look like a hang
        advance=lambda iterations, doing: note(doing) if doing else None,
        until=until,
        left_out=left_out,
    )
    # the ceiling is that of TF32 too
    set_precision_flags(device, deterministic=device.type != "cuda")
    add_utilisation(measured, network_flops(load_config(words)), device)
    return {**shown, "rows": measured, "left_out": left_out}
