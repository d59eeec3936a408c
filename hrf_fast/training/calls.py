"""CallPlan: which images share a network call, in rollouts whose starts differ and in their replay.

A lane is samples that move as one: a group, a part of one, a candidate of a search. It joins the others when the step
index reaches its start, so that late starts cost no early calls and early starts no calls of their own. The windows
alone decide, so every rank knows how many calls the others make.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hrf_fast.policies.base import Prediction
from hrf_fast.windows.base import Window

# images in a call where nothing is trained and compute.images_per_call leaves it open
SAMPLED_TOGETHER = 64


class Piece(NamedTuple):
    """Samples [first, last) of a group."""

    group: int
    first: int
    last: int

    @property
    def samples(self) -> slice:
        return slice(self.first, self.last)

    @property
    def size(self) -> int:
        return self.last - self.first


@dataclass
class Call:
    """One network call: pieces of groups at consecutive steps; several pieces share one step."""

    pieces: Sequence[Piece]
    steps: range
    trained: bool = True
    """True if the steps are in the windows of the pieces; False if they only finish the images."""
    prediction: Prediction | None = None
    """The network's output for the pieces in order, with its graph, where the rollout kept it for the update."""

    @property
    def images(self) -> int:
        return sum(piece.size for piece in self.pieces) * len(self.steps)


@dataclass(frozen=True)
class CallPlan:
    """How samples are put into network calls of at most `images_per_call` images.

    A group that is larger is split, smaller ones are joined. With 0 every group has calls of its own, one step each, as
    published, and 64 images share a call where nothing is trained.

    The order collect replays group by group, as many consecutive steps to a call as fit. The order on_policy replays
    the very calls of the rollout: these see the same batches, so the on-policy ratio is 1 to the bit.
    """

    group_size: int
    images_per_call: int = 0
    order: str = "collect"
    """collect or on_policy: see `training.iteration`."""
    kept_pairs: float = 0
    """Samples × window steps whose graphs a rank may keep from its rollout for the update; inf for all."""
    halves: bool = False
    """Whether groups of even and of odd numbers have calls of their own: see `training.gradient_noise`."""

    @property
    def sampled(self) -> int:
        """Most images in a call where nothing is trained: anchors, searches, panels."""
        return self.images_per_call or SAMPLED_TOGETHER

    @property
    def piece(self) -> int:
        """Samples of a group in a call."""
        return min(self.images_per_call or self.group_size, self.group_size)

    @property
    def groups_per_call(self) -> int:
        """Whole groups that share the calls of a rollout."""
        return max(1, self.images_per_call // self.group_size)

    @property
    def steps_per_call(self) -> int:
        """Consecutive window steps of a piece in a call of a replay."""
        return max(1, self.images_per_call // self.group_size) if self.order == "collect" else 1

    def packs(self, windows: Mapping[int, Window]) -> list[list[int]]:
        """Groups that share calls: neighbouring starts together, as many as fit, or each group alone."""
        size = self.groups_per_call
        groups = sorted(windows, key=lambda group: windows[group].start) if size > 1 else list(windows)
        parts = half_of(groups) if self.halves else (groups,)
        return [part[i : i + size] for part in parts for i in range(0, len(part), size)]

    def rollout(self, windows: Mapping[int, Window], num_steps: int) -> list[Call]:
        """The calls of one pack's rollout up to step `num_steps`, each inside all windows of its pieces or beyond."""
        pieces = list(self._pieces(windows))
        calls = together(
            [windows[piece.group].start for piece in pieces],
            [piece.size for piece in pieces],
            num_steps,
            images_per_call=max(self.images_per_call, self.piece),
            stops=[windows[piece.group].stop for piece in pieces],
        )
        return [
            Call([pieces[lane] for lane in lanes], range(step, step + 1), step < windows[pieces[lanes[0]].group].stop)
            for step, lanes in calls
        ]

    def replay(self, windows: Mapping[int, Window]) -> list[Call]:
        """The calls that run windows again, every step of every sample once."""
        if self.order == "on_policy":
            last = max(window.stop for window in windows.values())
            packs = [{group: windows[group] for group in pack} for pack in self.packs(windows)]
            return [call for pack in packs for call in self.rollout(pack, last) if call.trained]
        calls = []
        for piece in self._pieces(windows):
            window = windows[piece.group]
            for first in range(window.start, window.stop, self.steps_per_call):
                calls.append(Call([piece], range(first, min(first + self.steps_per_call, window.stop))))
        return calls

    def update(self, rolled_out: list[Call], windows: Mapping[int, Window]) -> list[Call]:
        """The calls of an optimizer step: those of its rollout, some with kept graphs, or a replay."""
        return rolled_out if self.order == "on_policy" else self.replay(windows)

    def keep_from(self, windows: Iterable[Window]) -> int | None:
        """The first step whose graphs are kept, such that all groups' from there on fit; None to keep none."""
        windows = list(windows)
        last = first = max(window.stop for window in windows)

        def pairs(step: int) -> int:
            return self.group_size * sum(max(0, window.stop - max(window.start, step)) for window in windows)

        while first > 0 and pairs(first - 1) <= self.kept_pairs:
            first -= 1
        return first if first < last else None

    def sizes(self, splits: Iterable[int]) -> list[int]:
        """A batch for every compiled graph of a run: the largest that is trained, and 1 where a split leaves one image.

        Args:
            splits: numbers of images that are sampled `sampled` at a time.
        """
        single = self.group_size % self.piece == 1 or self.piece == 1
        single = single or any(self.sampled == 1 or count % self.sampled == 1 for count in splits)
        return [max(2, self.piece * self.steps_per_call), *([1] if single else [])]

    def _pieces(self, groups: Iterable[int]) -> Iterator[Piece]:
        for group in groups:
            for first in range(0, self.group_size, self.piece):
                yield Piece(group, first, min(first + self.piece, self.group_size))


def half_of(groups: Sequence[int]) -> tuple[list[int], list[int]]:
    """Groups of even numbers and of odd ones."""
    return [group for group in groups if group % 2 == 0], [group for group in groups if group % 2]


def together(
    starts: Sequence[int],
    sizes: Sequence[int],
    num_steps: int,
    *,
    images_per_call: int,
    stops: Sequence[int] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Plan the calls that bring every lane from its start to the end, step by step.

    Args:
        starts: first step of each lane; sizes: its images; num_steps: T.
        images_per_call: a lane is never split, so one that is larger has calls of its own.
        stops: ends of the lanes' windows: a call holds lanes inside their windows or lanes beyond them, not both.

    Yields:
        (step, lanes), each lane once at every step from its start to T − 1, in ascending order within a call.
    """
    for step in range(min(starts, default=num_steps), num_steps):
        active = [lane for lane, start in enumerate(starts) if start <= step]
        beyond = [lane for lane in active if stops is not None and step >= stops[lane]]
        inside = [lane for lane in active if lane not in beyond]
        for lanes in (inside, beyond):
            for call in filled(lanes, sizes, images_per_call):
                yield step, call


def filled(lanes: Sequence[int], sizes: Sequence[int], images_per_call: int) -> Iterator[list[int]]:
    """Consecutive lanes, as many to a call as fit."""
    call: list[int] = []
    for lane in lanes:
        if call and sum(sizes[other] for other in call) + sizes[lane] > images_per_call:
            yield call
            call = []
        call.append(lane)
    if call:
        yield call
