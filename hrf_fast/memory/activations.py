"""Activations: which of a window's graphs the rollout keeps for the update, and which are made again.

keep        window steps run with gradient; the update needs no forward of its own
replay      the update runs window steps again
checkpoint  the same, with each UNet block run once more in the backward
auto        keep as many steps as fit into memory, replay the rest; checkpoint where not even that fits
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from hrf_fast.config.amounts import parse_memory, show_bytes
from hrf_fast.config.options import Config
from hrf_fast.distributed import comm
from hrf_fast.distributed.launcher import ranks_of_machine
from hrf_fast.memory.counts import count_calls
from hrf_fast.memory.footprint import measure_running
from hrf_fast.memory.planner import RESERVE, Plan
from hrf_fast.memory.zero import engine_of
from hrf_fast.policies.base import Policy

# of this process, where it is in a container
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Activations:
    """The choice for a run."""

    kept_pairs: float
    """Samples × window steps whose graphs this rank may hold at once."""
    checkpoint: bool = False
    """Whether UNet blocks run again in the backward."""
    reason: str = ""
    """Why `auto` chose this mode; printed at the start."""


def choose_activations(
    config: Config, policy: Policy, memory: int, schedule: str | Callable[..., Any] | None = None
) -> Activations:
    """The mode of compute.activations; for auto by the bytes of a network call, measured, and the memory that there is.

    Args:
        memory: bytes for this process, the least of all ranks; for auto only.
        schedule: instead of window.schedule, a name or a factory.

    Raises:
        ValueError: nothing fits; says what would.
    """
    mode = config.compute.activations
    if mode != "auto":
        return Activations(math.inf if mode == "keep" else 0, checkpoint=mode == "checkpoint")
    name, bucket = engine_of(config)
    guided = config.train.guidance
    footprints = {(policy.precision, False): measure_running(policy, checkpointing=False, guided=guided)}
    condition = policy.condition([None], guided=guided)
    counts = count_calls(config, policy.sampler.stochastic_steps, schedule, branches=condition.branches)
    ranks, encoder = comm.world_size(), policy.visiting_bytes
    plan = Plan(config, ranks, memory, name, bucket, counts, footprints, encoder=encoder, condition=condition.bytes)
    return _fitting(plan, policy)


def _fitting(plan: Plan, policy: Policy) -> Activations:
    """The fastest mode that fits into a plan's memory."""
    name, precision, usable = plan.engine, policy.precision, plan.memory * (1 - RESERVE)
    compute = plan.config.compute

    def need(mode: str) -> float:
        return plan.need(name, precision, mode, compute.images_per_call)

    source = "left for training by compute.memory_budget" if compute.memory_budget else "free"
    of = f"of {show_bytes(plan.memory)} ({source}, 10 % of it in reserve)"
    if "keep" in plan.modes(name) and need("keep") <= usable:
        return Activations(math.inf, reason=f"activations: keep, {show_bytes(need('keep'))} {of}")
    if need("replay") <= usable:
        # no panel is drawn beside kept graphs
        beside = plan.need(name, precision, "replay", compute.images_per_call, panel=False)
        pairs = _pairs_that_fit(plan, precision, usable - beside)
        if pairs >= plan.kept_samples:
            limit = f"keep for up to {pairs} samples x steps of {plan.kept_samples * plan.counts.longest_window}"
            reason = f"activations: {limit}, replay for the rest, {show_bytes(usable)} {of}"
            return Activations(pairs, reason=reason)
        return Activations(0, reason=f"activations: replay, {show_bytes(need('replay'))} {of}")
    plan.footprints[precision, True] = measure_running(policy, checkpointing=True, guided=plan.config.train.guidance)
    if need("checkpoint") <= usable:
        reason = f"activations: checkpoint, {show_bytes(need('checkpoint'))} {of}"
        return Activations(0, checkpoint=True, reason=reason)
    least = plan.need(name, precision, "checkpoint", 1) / (1 - RESERVE)
    smaller = plan.choose(name, precision, "checkpoint")
    way = (
        f"compute.images_per_call={smaller.images_per_call} would fit"
        if smaller
        else f"even one image at a time needs {show_bytes(least)}; use a GPU with more, a smaller model or "
        "evaluation.panel_size, or ZeRO with offload (engine.deepspeed=configs/deepspeed/zero3_offload.json)"
    )
    raise ValueError(
        "compute.activations is auto and nothing fits: the least, checkpoint, needs "
        f"{show_bytes(need('checkpoint'))} {of}; {way}"
    )


def _pairs_that_fit(plan: Plan, precision: str, spare: float) -> int:
    """Samples × steps whose graphs fit into `spare` bytes beside a replay; 0 where steps can't be kept in part."""
    # ranks in lockstep must make equally many forwards: all of a window is kept, or none
    if "keep" not in plan.modes(plan.engine) or plan.engine.startswith("zero2"):
        return 0
    images = plan.rollout_images(plan.config.compute.images_per_call)
    return int(spare * images / plan.footprints[precision, False].kept(images))


def memory_for(config: Config, policy: Policy) -> int:
    """Bytes that this process may take for the network and its training.

    They are those of compute.memory_budget less what else lies on a GPU, such as encoders, decoder and a reward's
    network; or the free ones and those of the network's weights.

    Raises:
        ValueError: compute.memory_budget is no amount.
    """
    weights = sum(parameter.nbytes for parameter in policy.network.parameters())
    if config.compute.memory_budget:
        budget = parse_memory(config.compute.memory_budget, "compute.memory_budget")
        if policy.device.type != "cuda":
            return budget
        return max(0, budget - max(0, torch.cuda.memory_allocated(policy.device) - weights))
    if policy.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(policy.device)
        cached = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        return free + cached + weights
    # a container may have less than the machine
    room = min(psutil.virtual_memory().available, _left_to_container())
    # ranks of one machine share it
    return int(room) // ranks_of_machine() + weights


def _left_to_container() -> float:
    """Bytes that this process's control group (version 2) has left; inf where there is none or it sets no limit."""
    limit = _CGROUP / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return math.inf
    stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    # cached files count as used and go when memory is wanted
    used = int((_CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
    return max(0, int(limit.read_text()) - used)
