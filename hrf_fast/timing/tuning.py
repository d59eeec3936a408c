"""Tuning: threads and memory format of a run on a CPU, chosen by a measured warm-up and written into its config.yaml.

Both change how sums are rounded, so a run keeps what its first start has chosen: a resume measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from hrf_fast.config.options import Config
from hrf_fast.config.paths import absolute
from hrf_fast.devices import choose_device
from hrf_fast.distributed import comm
from hrf_fast.policies.base import Policy
from hrf_fast.run.layout import RunFiles
from hrf_fast.timing.calls import candidate_threads, fastest
from hrf_fast.training.calls import CallPlan


def tuned(config: Config, load: Callable[[Config], Policy]) -> tuple[Config, str]:
    """The configuration with compute.auto_tune's choice in it, and a line about it; as it is where that is off.

    Args:
        load: loads the model of a configuration.

    Raises:
        ValueError: a device or a job that there is nothing to choose for.
    """
    if not config.compute.auto_tune:
        return config, ""
    device = choose_device(config.run.device)
    if device.type != "cpu" or comm.world_size() > 1:
        where = f"the device is {device}" if device.type != "cpu" else f"there are {comm.world_size()} ranks"
        raise ValueError(
            f"compute.auto_tune is true but {where}: it chooses threads and memory format of one process on a CPU; set "
            "it to false, and compute.channels_last by hand"
        )
    before = RunFiles(absolute(config.run.folder))
    if before.config_file.is_file() and (chosen := before.read_config().compute).threads:
        return _with_choice(config, chosen.threads, chosen.channels_last), ""
    train = config.train
    plan = CallPlan(train.group_size, config.compute.images_per_call, train.order)
    trained = plan.piece * plan.steps_per_call
    threads, last, line = fastest(load(config), sampled=plan.piece, trained=trained, threads=candidate_threads())
    return _with_choice(config, threads, last), line


def _with_choice(config: Config, threads: int, channels_last: bool) -> Config:
    return replace(
        config, compute=replace(config.compute, auto_tune=False, threads=threads, channels_last=channels_last)
    )


def set_threads(config: Config) -> None:
    """Let torch compute with compute.threads, where that is not 0."""
    if config.compute.threads:
        torch.set_num_threads(config.compute.threads)
