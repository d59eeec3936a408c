"""Activations: which of a window's graphs the rollout keeps for the update, and which are made again.

keep        window steps run with gradient; the update needs no forward of its own
replay      the update runs window steps again
checkpoint  the same, with each UNet block run once more in the backward
auto        keep as many steps as fit into memory, replay the rest; checkpoint where not even that fits
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hrf_fast.config.amounts import parse_memory, show_bytes
from hrf_fast.config.options import Config
from hrf_fast.distributed import comm
from hrf_fast.memory.footprint import measure_running
from hrf_fast.memory.planner import RESERVE, Plan, count_calls, engine_of
from hrf_fast.policies.pixel import Policy
from hrf_fast.windows.base import Window

_MEMINFO = Path("/proc/meminfo")
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
    """For the user, of a choice that was made for him."""

    def keep_from(self, windows: Mapping[int, Window], group_size: int) -> int | None:
        """The first step whose graphs are kept, so that those of all groups from there on are; None to keep none."""
        last = max(window.stop for window in windows.values())
        first = last
        while first > 0 and self._pairs(windows, group_size, first - 1) <= self.kept_pairs:
            first -= 1
        return first if first < last else None

    def _pairs(self, windows: Mapping[int, Window], group_size: int, first: int) -> int:
        return group_size * sum(max(0, w.stop - max(w.start, first)) for w in windows.values())


def choose_activations(config: Config, policy: Policy, memory: int) -> Activations:
    """The mode of compute.activations; for auto by the bytes of a UNet call, measured, and the memory that there is.

    Args:
        memory: bytes for this process, the least of all ranks; for auto only.

    Raises:
        ValueError: nothing fits; says what would.
    """
    mode = config.compute.activations
    if mode != "auto":
        return Activations(math.inf if mode == "keep" else 0, checkpoint=mode == "checkpoint")
    compute, precision = config.compute, config.compute.precision
    name, bucket = engine_of(config)
    footprints = {(precision, False): measure_running(policy.unet, precision, checkpointing=False)}
    calls = count_calls(config, policy.diffusion.stochastic_steps)
    plan = Plan(config, comm.world_size(), memory, name, bucket, calls, footprints)
    micro, usable = config.samples_per_call, memory * (1 - RESERVE)

    def need(mode: str) -> float:
        return plan.need(name, precision, mode, micro, compute.batch_size)

    source = "compute.memory_budget" if compute.memory_budget else "free"
    of = f"of {show_bytes(memory)} ({source}, 10 % of it in reserve)"
    if "keep" in plan.modes and need("keep") <= usable:
        return Activations(math.inf, reason=f"activations: keep, {show_bytes(need('keep'))} {of}")
    if need("replay") <= usable:
        per_pair = footprints[precision, False].kept(plan.batch(micro)) / plan.batch(micro)
        # ranks in lockstep must make equally many forwards: all of a window is kept, or none
        mixes = "keep" in plan.modes and not name.startswith("zero2")
        pairs = int((usable - need("replay")) / per_pair) if mixes else 0
        if pairs >= plan.kept_samples:
            kept = f"keep for up to {pairs} samples x steps of {plan.kept_samples * calls.longest_window}, replay for"
            return Activations(pairs, reason=f"activations: {kept} the rest, {show_bytes(usable)} {of}")
        return Activations(0, reason=f"activations: replay, {show_bytes(need('replay'))} {of}")
    footprints[precision, True] = measure_running(policy.unet, precision, checkpointing=True)
    if need("checkpoint") <= usable:
        reason = f"activations: checkpoint, {show_bytes(need('checkpoint'))} {of}"
        return Activations(0, checkpoint=True, reason=reason)
    apart = "compute.max_batch=0, " if compute.max_batch else ""
    if apart:
        plan = replace(plan, config=replace(config, compute=replace(compute, max_batch=0)))
    least = plan.need(name, precision, "checkpoint", 1, 1) / (1 - RESERVE)
    smaller = plan.choose(name, precision, "checkpoint")
    way = (
        f"{apart}compute.micro_batch_size={smaller.micro_batch_size} and "
        f"compute.batch_size={smaller.sample_batch_size} would fit"
        if smaller
        else f"even one image at a time needs {show_bytes(least)}; use a GPU with more, a smaller model, or ZeRO with "
        "offload (engine.deepspeed=configs/deepspeed/zero3_offload.json)"
    )
    raise ValueError(
        "compute.activations is auto and nothing fits: the least, checkpoint, needs "
        f"{show_bytes(need('checkpoint'))} {of}; {way}"
    )


def memory_for(config: Config, policy: Policy) -> int:
    """Bytes that this process may take in all: compute.memory_budget, or free ones and those of its weights.

    Raises:
        ValueError: no amount, or a system that does not say what is free.
    """
    if config.compute.memory_budget:
        return parse_memory(config.compute.memory_budget, "compute.memory_budget")
    weights = sum(parameter.nbytes for parameter in policy.unet.parameters())
    if policy.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(policy.device)
        cached = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
        return free + cached + weights
    if not _MEMINFO.is_file():
        raise ValueError(
            "compute.activations is auto, but this system does not say how much memory is free; set "
            "compute.memory_budget, such as 8GB"
        )
    kib = {line.split(":")[0]: int(line.split()[1]) for line in _MEMINFO.read_text().splitlines()}
    # a container may have less than the machine
    room = min(float(kib["MemAvailable"] * 1024), _left_to_container())
    # ranks of one machine share it
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    return int(room) // ranks + weights


def _left_to_container() -> float:
    """Bytes that this process's control group (version 2) has left; inf where there is none or it sets no limit."""
    limit = _CGROUP / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return math.inf
    stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    # cached files count as used and go when memory is wanted
    used = int((_CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
    return max(0, int(limit.read_text()) - used)
