"""Comm: the ranks of a job, by plain torch.distributed (gloo on CPU, nccl on CUDA).

With one process everything here does nothing. launcher.py reads what the launcher has set, watch.py finds a rank that
dies, failures.py carries an exception to the other ranks.
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
from torch.distributed.rendezvous import rendezvous

from hrf_fast.distributed import failures, launcher

Value = TypeVar("Value")

# of one collective; the watch finds a dead rank much sooner, a slow checkpoint or reward must not end a job
_TIMEOUT = timedelta(hours=2)
# for all ranks to come to the start
_JOIN = timedelta(minutes=10)
# how many blocks of `agreed` this process is in
_agreeing = 0


def rank() -> int:
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    return dist.get_world_size() if _joined() else 1


def _joined() -> bool:
    # some builds of torch have no ranks
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Whether this rank writes files and speaks."""
    return rank() == 0


@contextmanager
def job(lost_after: float) -> Iterator[None]:
    """Join the launcher's process group, watch the other ranks, and leave it; joined already (a test), nothing.

    Args:
        lost_after: run.lost_after, seconds after which a machine that answers nothing is given up.

    Raises:
        ValueError: a launcher's variable is missing or wrong, or the ranks don't come together.
    """
    if _joined():
        yield
        return
    here = launcher.read_place()
    if here.world_size == 1:
        yield
        return
    from hrf_fast.distributed.watch import Watch

    _join(here)
    watch = Watch(rank(), world_size(), broadcast, lost_after=lost_after)
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


def _join(here: launcher.Place) -> None:
    """Make the process group of all ranks.

    Raises:
        ValueError: they don't come together; says where they were to meet.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        # choose_device refuses a rank that has no GPU of its own
        if here.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(here.local_rank)
    try:
        store, number, count = next(rendezvous("env://", timeout=_JOIN))
        store.set_timeout(_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=_TIMEOUT)
    except RuntimeError as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        way_out = (
            "the port is in use; set MASTER_PORT to a free one"
            if "EADDRINUSE" in str(error)
            else "see that all of them were started, and that MASTER_ADDR is the machine of rank 0"
        )
        raise ValueError(
            f"rank {here.rank} could not join the {here.world_size} ranks at MASTER_ADDR {address}, MASTER_PORT "
            f"{port}: {way_out} ({str(error).splitlines()[0]})"
        ) from error


def said_by_main(error: BaseException) -> bool:
    """Whether every rank raises this error at the same place, so that the main rank speaks for all."""
    return isinstance(error, KeyboardInterrupt) or getattr(error, "on_all_ranks", False)


def on_all_ranks(error: Value) -> Value:
    """Mark an error that every rank raises, each for the same reason."""
    error.on_all_ranks = True  # type: ignore[attr-defined]
    return error


def gather(value: Value) -> list[Value]:
    """Every rank's value, in the order of ranks, on every rank; of a view into a tensor, all of that tensor is sent."""
    if world_size() == 1:
        return [value]
    _check_outside()
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """The tensors [N, …] of all ranks, of one shape, as [ranks·N, …]."""
    if world_size() == 1:
        return rows
    _check_outside()
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def largest(value: float) -> float:
    """The largest of the ranks' values; NaN counts as infinite."""
    return max(math.inf if math.isnan(each) else each for each in gather(value))


def broadcast(value: Value) -> Value:
    """The main rank's value; of a view into a tensor, all of that tensor is sent."""
    if world_size() == 1:
        return value
    _check_outside()
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


@torch.no_grad()
def take_main(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by the main rank's, of the same shape and type."""
    if world_size() == 1:
        return
    _check_outside()
    for tensor in tensors:
        value = tensor.detach().contiguous()
        dist.broadcast(value, 0)
        tensor.copy_(value)


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, by one flat all_reduce."""
    if world_size() == 1:
        return
    _check_outside()
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
    global _agreeing
    failure: Exception | None = None
    _agreeing += 1
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        failure = error
    finally:
        _agreeing -= 1
    if world_size() == 1:
        return
    for number, packed in enumerate(gather(None if failure is None else failures.pack(failure))):
        if packed is not None:
            raise on_all_ranks(failures.unpack(packed, number)) from failure


def _check_outside() -> None:
    """Refuse a collective within `agreed`: where one rank fails, the others would wait in it."""
    if _agreeing:
        raise AssertionError("a collective within comm.agreed(), where one rank's error leaves the others waiting")
