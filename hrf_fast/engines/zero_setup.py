"""DeepSpeed before its first use: its import, its process group, and its own look at the settings."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from hrf_fast.distributed import comm


def check_settings(settings: dict[str, Any]) -> None:
    """Let DeepSpeed look at sections that we don't know, such as comms_logger.

    Raises:
        ValueError: names the key and its value.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(settings)
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        # pydantic lists what is wrong
        wrong = [
            f"{getattr(error, 'title', '')}.{'.'.join(map(str, entry['loc']))} is {entry['input']!r}: {entry['msg']}"
            for entry in getattr(error, "errors", list)()
        ]
        refused = f"DeepSpeed refuses the file of engine.deepspeed: {'; '.join(wrong) or error}"
        raise comm.on_all_ranks(ValueError(refused)) from error


def ignore_old_names() -> None:
    """Ignore torch's warnings about names that are DeepSpeed's to change: ZeRO-3 calls both in every forward."""
    old_names = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=old_names, category=FutureWarning)


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Inside, DeepSpeed puts weights on this GPU by LOCAL_RANK, which a launcher has set for each of several ranks."""
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK") if comm.world_size() == 1 else ()
    before = {name: os.environ.get(name) for name in names}
    for name, value in before.items():
        # DeepSpeed refuses one of mpirun's that differs
        if name == "LOCAL_RANK" or value is not None:
            os.environ[name] = str(device.index or 0)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed in a process group: that of the launcher, or one of a single rank."""
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError(
            'engine.deepspeed needs DeepSpeed: `pip install "hrf_fast[gpu]"`, or set it to null'
        ) from error
    from deepspeed.ops import __compatible_ops__

    ignore_old_names()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # compiles for 100 seconds and is not used by training
        __compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return deepspeed
