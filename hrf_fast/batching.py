"""Batching: which samples share a UNet call when they start at different steps.

A lane is samples that move as one: a group, a part of one, a candidate of a search. It joins the others when the step
index reaches its start, so that late starts cost no early calls and early starts no calls of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def together(
    starts: Sequence[int], sizes: Sequence[int], num_steps: int, *, max_batch: int, stops: Sequence[int] | None = None
) -> Iterator[tuple[int, list[int]]]:
    """The UNet calls that bring every lane from its start to the end, step by step.

    Args:
        starts: first step of each lane; sizes: its images; num_steps: T.
        max_batch: images in a call; a lane is never split, so one that is larger has calls of its own.
        stops: ends of the lanes' windows: a call holds lanes inside their windows or lanes beyond them, not both.

    Yields:
        (step, lanes), each lane once at every step from its start to T − 1, in ascending order within a call.
    """
    for step in range(min(starts), num_steps):
        active = [lane for lane, start in enumerate(starts) if start <= step]
        beyond = [lane for lane in active if stops is not None and step >= stops[lane]]
        inside = [lane for lane in active if lane not in beyond]
        for lanes in (inside, beyond):
            for call in _packed(lanes, sizes, max_batch):
                yield step, call


def _packed(lanes: Sequence[int], sizes: Sequence[int], max_batch: int) -> Iterator[list[int]]:
    """Consecutive lanes, as many to a call as fit."""
    call: list[int] = []
    for lane in lanes:
        if call and sum(sizes[other] for other in call) + sizes[lane] > max_batch:
            yield call
            call = []
        call.append(lane)
    if call:
        yield call
