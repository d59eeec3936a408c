"""Batching: which samples share a UNet call, in rollouts whose starts differ and in their replay.

A lane is samples that move as one: a group, a part of one, a candidate of a search. It joins the others when the step
index reaches its start, so that late starts cost no early calls and early starts no calls of their own. All of it is
known from the windows alone, so every rank knows how many calls the others make.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hrf_fast.windows.base import Window


class Piece(NamedTuple):
    """Samples [first, last) of a group."""

    group: int
    first: int
    last: int

    @property
    def samples(self) -> slice:
        return slice(self.first, self.last)


@dataclass
class Call:
    """One UNet call: pieces of groups at consecutive steps; several pieces share one step."""

    pieces: Sequence[Piece]
    steps: range
    inside: bool = True
    """Of the windows of its pieces, rather than beyond them."""
    output: Tensor | None = None
    """[n, C, H, W] of the pieces in order, with its graph, where the rollout has kept it for the update."""

    @property
    def images(self) -> int:
        return sum(piece.last - piece.first for piece in self.pieces) * len(self.steps)


def rollout_calls(
    windows: Mapping[int, Window], *, group_size: int, micro_batch_size: int, max_batch: int, num_steps: int
) -> list[Call]:
    """The UNet calls of groups' rollouts, each inside all windows of its pieces or beyond them.

    Args:
        windows: by group; micro_batch_size: most samples of a group in a call; max_batch: images to which calls join
            groups, 0 for none.
    """
    pieces = list(_pieces(windows, group_size, micro_batch_size))
    calls = together(
        [windows[piece.group].start for piece in pieces],
        [piece.last - piece.first for piece in pieces],
        num_steps,
        max_batch=max(max_batch, micro_batch_size),
        stops=[windows[piece.group].stop for piece in pieces],
    )
    return [
        Call([pieces[lane] for lane in lanes], range(step, step + 1), step < windows[pieces[lanes[0]].group].stop)
        for step, lanes in calls
    ]


def packs_of(windows: Mapping[int, Window], group_size: int, max_batch: int) -> list[dict[int, Window]]:
    """Groups that advance together: as many as `max_batch` images hold, of neighbouring starts, or each alone."""
    size = max(1, max_batch // group_size)
    groups = sorted(windows, key=lambda group: windows[group].start) if size > 1 else list(windows)
    return [{group: windows[group] for group in groups[i : i + size]} for i in range(0, len(groups), size)]


def replay_calls(
    windows: Mapping[int, Window], *, group_size: int, micro_batch_size: int, steps_per_forward: int
) -> list[Call]:
    """The UNet calls that run windows again, group by group, `steps_per_forward` steps of a piece at a time."""
    calls = []
    for piece in _pieces(windows, group_size, micro_batch_size):
        window = windows[piece.group]
        for first in range(window.start, window.stop, steps_per_forward):
            calls.append(Call([piece], range(first, min(first + steps_per_forward, window.stop))))
    return calls


def _pieces(groups: Iterable[int], group_size: int, micro_batch_size: int) -> Iterator[Piece]:
    for group in groups:
        for first in range(0, group_size, micro_batch_size):
            yield Piece(group, first, min(first + micro_batch_size, group_size))


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
