"""Comm: the ranks of a job, by plain torch.distributed (gloo on CPU, nccl on CUDA).

`deepspeed`, torchrun and `accelerate launch` all set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. With
one process everything here does nothing. A rank that dies is found by heartbeat.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")

# of one collective; a dead rank is found much sooner by its heartbeat, a slow checkpoint or reward must not end a job
_TIMEOUT = timedelta(hours=2)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this rank writes files and speaks."""
    return rank() == 0


@contextmanager
def job() -> Iterator[None]:
    """Join the launcher's process group, watch the other ranks, and leave it; joined already (a test), nothing.

    Raises:
        ValueError: a launcher's variable is missing.
    """
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {world_size()} but {', '.join(missing)} is not set; start with deepspeed, torchrun or "
            "accelerate launch, or unset WORLD_SIZE"
        )
    from hrf_fast.distributed.heartbeat import Watch

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    watch = Watch(rank(), world_size())
    try:
        yield
        dist.barrier()
    except BaseException as error:
        alone = not said_by_main(error)
        if alone and (type(error) is RuntimeError or isinstance(error, dist.DistError)):
            # most likely a connection that broke: the watch names the rank that died, and ends this process
            watch.expect_death()
        watch.leave(failed=alone)
        if getattr(error, "on_all_ranks", False):
            # as after a run that ended well: a group left open can abort the rank that exits after its peer
            dist.destroy_process_group()
        raise
    watch.leave(failed=False)
    dist.destroy_process_group()


def said_by_main(error: BaseException) -> bool:
    """Whether every rank raises this error at the same place, so that the main rank speaks for all."""
    return isinstance(error, KeyboardInterrupt) or getattr(error, "on_all_ranks", False)


def on_all_ranks(error: Value) -> Value:
    """Mark an error that every rank raises, each for the same reason."""
    error.on_all_ranks = True  # type: ignore[attr-defined]
    return error


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def gather(value: Value) -> list[Value]:
    """Every rank's value, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """The tensors [N, …] of all ranks, of one shape, as [ranks·N, …]."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def largest(value: float) -> float:
    """The largest of the ranks' values; NaN counts as infinite."""
    return max(math.inf if math.isnan(each) else each for each in gather(value))


def broadcast(value: Value) -> Value:
    """The main rank's value."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def broadcast_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The main rank's tensors by name, one after the other."""
    if world_size() == 1:
        yield from tensors.items()
        return
    for name, shape, dtype in broadcast([(name, value.shape, value.dtype) for name, value in tensors.items()]):
        value = tensors[name].cpu().contiguous() if is_main() else torch.empty(shape, dtype=dtype)
        dist.broadcast(value, 0)
        yield name, value


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, by one flat all_reduce."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def main_says(ask: Callable[[], Value]) -> Value:
    """Call `ask` on the main rank; every rank returns its value, or raises its error."""
    answer: Any = None
    with agreed():
        if is_main():
            answer = ask()
    return broadcast(answer)


@contextmanager
def agreed() -> Iterator[None]:
    """A block without collectives that every rank passes or none: the first rank's error is raised on all."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        failure = error
    if world_size() == 1:
        return
    failures = gather(None if failure is None else (type(failure), str(failure)))
    for number, problem in enumerate(failures):
        if problem is not None:
            kind, message = problem
            try:
                raised = kind(f"rank {number}: {message}" if number else message)
            # an exception that wants other arguments
            except TypeError:
                raised = RuntimeError(message)
            raise on_all_ranks(raised) from failure
