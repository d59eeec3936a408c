"""The self-check before training: is the ratio of an on-policy replay 1, and far enough within the clip range?

A rollout and its update score the same step twice. If the two disagree by as much as the clip range, the clip acts on
rounding noise instead of on policy change.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from hrf_fast.config.options import Config
from hrf_fast.distributed import comm
from hrf_fast.noise import NoiseKey, noise_key
from hrf_fast.policies.sample import starting_noise
from hrf_fast.training.components import Parts
from hrf_fast.training.optimizer_step import replay_ratio_error
from hrf_fast.training.rollout import Start, rollout
from hrf_fast.training.update import Batch, calls_of
from hrf_fast.windows.base import Window

# steps to replay: the least that a chunk of steps_per_forward needs, and cheap
_STEPS = 2
# under this the fp32 gradients of a step lose digits (measured: 6e-4 relative at 1e-4)
_SMALL_STD = 1e-3


def self_check(parts: Parts, config: Config) -> str:
    """Roll out and replay a few late steps, where std is least and the ratio most sensitive.

    Returns:
        One line for the user: which implementation runs, the largest |ratio − 1| and the smallest clip range.
    """
    policy, train, compute = parts.policy, config.train, config.compute
    table = policy.diffusion
    window = Window(max(0, table.stochastic_steps - max(_STEPS, compute.steps_per_forward)), table.stochastic_steps)
    windows = dict.fromkeys(range(_joined(config)), window)
    starts = {}
    for group in windows:
        ids = torch.arange(group * train.group_size, (group + 1) * train.group_size, device=policy.device)
        noise = NoiseKey(noise_key(config.run.seed, 0, "self_check"), ids)
        starts[group] = Start(window, starting_noise(policy, noise), noise)
    # where only some steps are kept, those that are replayed are the ones to check
    keep_from = window.start if math.isinf(parts.activations.kept_pairs) else None
    batches: Any = {"micro_batch_size": config.samples_per_call, "max_batch": compute.max_batch}
    with policy.uncounted():
        batch = Batch(*rollout(policy, starts, keep_from=keep_from, **batches))
        error = replay_ratio_error(policy, batch.trajectories, calls_of(config, batch, windows))
    # one rank's device may round otherwise; all ranks must come to one verdict
    error = max(comm.gather(error), key=lambda value: math.inf if math.isnan(value) else value)
    # the least window that any schedule can choose is the last stochastic step
    scale = (len(table) - table.stochastic_steps + 1) / len(table) if train.scale_clips_by_window else 1.0
    smallest = train.clip_range * scale
    verdict = "exact" if error == 0 else "well inside it" if error < smallest / 10 else "NOT well inside it"
    line = [
        f"self-check: kernels {policy.kernels} ({policy.kernels_reason}), {policy.precision}, "
        f"on-policy |ratio - 1| {error:.2g}, smallest clip range {smallest:.2g}: {verdict}"
    ]
    if verdict.startswith("NOT"):
        ways_out = [
            "compute.steps_per_forward=1" if compute.steps_per_forward > 1 else "",
            "compute.max_batch=0" if len(windows) > 1 and keep_from is None else "",
            "compute.compile=none" if compute.compile != "none" else "",
            "compute.precision=fp32" if policy.precision != "fp32" else "",
            f"a train.clip_range of at least {10 * error / scale:.2g}" if math.isfinite(error) else "",
        ]
        line.append(f"the clip will act on rounding noise: use {' or '.join(filter(None, ways_out))}")
    least_std = float(table.coefficients.std[: table.stochastic_steps].min())
    if least_std < _SMALL_STD:
        line.append(f"std falls to {least_std:.2g}, under which fp32 gradients lose digits")
    return "; ".join(line)


def _joined(config: Config) -> int:
    """How many groups share the UNet calls of a rollout."""
    train = config.train
    groups = train.groups_per_iteration if train.order == "collect" else train.groups_per_step
    return min(groups // comm.world_size(), max(1, config.compute.max_batch // train.group_size))
