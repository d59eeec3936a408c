"""Windows with noise inside and deterministic steps around them: MixGRPO and Flow-GRPO-Fast.

The samples of a group start from one noise and follow the sampler's deterministic form (a flow's ODE, DDIM with eta 0)
to the window, where their own noise parts them; after the window they are deterministic again. So a reward is due to
the window's noise alone, and the steps before it cost one network call a group. With window.shared_noise=false every
sample starts from a noise of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Generator

from hrf_fast.registry import check_count
from hrf_fast.windows.base import Probe, Window, check_width, draw_starts, register_schedule


class Mixed:
    """Windows of one width whose starts are drawn, one per group, from a list that depends on the iteration."""

    needs_anchors = False

    def __init__(self, starts_at: Callable[[int], Sequence[int]], width: int) -> None:
        self.starts_at, self.width, self.shortest = starts_at, width, Window(0, width)

    def __call__(self, iteration: int, num_groups: int, *, generator: Generator, probe: Probe) -> list[Window]:
        drawn = draw_starts(self.starts_at(iteration), num_groups, generator)
        return [Window(start, start + self.width, deterministic=True, shared=True) for start in drawn]


@register_schedule("mixgrpo")
def mixgrpo(
    *,
    num_inference_steps: int,
    stop: int,
    width: int = 4,
    iterations_per_start: int = 25,
    stride: int = 1,
    wrap: bool = True,
) -> Mixed:
    """MixGRPO (arXiv 2507.21802): a window that all groups share moves to later steps.

    Args:
        width: steps of the window.
        iterations_per_start: after so many iterations it moves.
        stride: by so many steps.
        wrap: at the end it begins again, as its authors' runs do (their --roll_back); false lets it stay, as in the
            paper.
    """
    check_count("window.kwargs.iterations_per_start", iterations_per_start)
    check_count("window.kwargs.stride", stride)
    check_width(width, stop)
    if type(wrap) is not bool:
        raise ValueError(f"window.kwargs.wrap is {wrap!r}; use true or false")
    last = stop - width
    starts = sorted({*range(0, last, stride), last})

    def start_at(iteration: int) -> list[int]:
        move = iteration // iterations_per_start
        return [starts[move % len(starts) if wrap else min(move, len(starts) - 1)]]

    return Mixed(start_at, width)


@register_schedule("flow_grpo_fast")
def flow_grpo_fast(*, num_inference_steps: int, stop: int, width: int = 2, inside: Any = None) -> Mixed:
    """Flow-GRPO-Fast (github.com/yifan123/flow_grpo): each group trains some steps at a random place.

    Args:
        width: steps of a window.
        inside: the half-open range of steps that windows lie in; null for the first half of the trajectory.
    """
    check_width(width, stop)
    first, end = _bounds([0, min(stop, max(width, num_inference_steps // 2))] if inside is None else inside)
    if not 0 <= first <= end - width or end > stop:
        raise ValueError(
            f"window.kwargs.inside is {inside!r}; use a range [first, stop] of at least {width} steps (window.kwargs."
            f"width) that ends by the deterministic end at {stop}"
        )
    return Mixed(lambda iteration: range(first, end - width + 1), width)


def _bounds(inside: Any) -> tuple[int, int]:
    if isinstance(inside, (list, tuple)) and len(inside) == 2 and all(type(step) is int for step in inside):
        return inside[0], inside[1]
    raise ValueError(f"window.kwargs.inside is {inside!r}; use a half-open range of steps such as [0, 10]")
