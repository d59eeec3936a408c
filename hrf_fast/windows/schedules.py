"""Window schedules: which denoising steps each group trains, this iteration.

A schedule is called on every rank with equal arguments and must return equal windows: it draws from a generator that
depends on (seed, iteration) only, and what it probes is gathered from all ranks. `register_schedule` adds one;
`module:function` in window.schedule names a user's factory. The searched one, HRF-D, is in dynamic.py, and those
with deterministic steps around a window are in mixed.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Generator

from hrf_fast.registry import (
    call_factory,
    check_count,
    load_user_function,
    qualified_name,
)
from hrf_fast.signatures import Argument, arguments_of, summary

# imported to register theirs
from hrf_fast.windows import dynamic, mixed  # noqa: F401
from hrf_fast.windows.base import (
    SCHEDULES,
    Factory,
    Probe,
    Window,
    WindowSchedule,
    check_width,
    draw_starts,
    register_schedule,
)


def build_schedule(
    name: str | Factory, kwargs: dict[str, Any], *, num_inference_steps: int, stop: int
) -> WindowSchedule:
    """Build the schedule that a config names.

    Args:
        name: a registered name, `module:function`, or a factory itself.
        kwargs: window.kwargs, the factory's own options.
        num_inference_steps: T; stop: end of every window, T less the deterministic last steps.

    Raises:
        ValueError: unknown name or option, or a start that leaves no step to train.
    """
    if callable(name):
        factory, name = name, qualified_name(name)
    else:
        factory = load_user_function(name, "window.schedule") if ":" in name else SCHEDULES[name]
    made = ("iteration", "num_groups", "generator", "probe")
    of_the_run = {"num_inference_steps": num_inference_steps, "stop": stop}
    schedule = call_factory(factory, "window.kwargs", kwargs, made=made, **of_the_run)
    if not callable(schedule) or not {"generator", "probe"} <= set(inspect.signature(schedule).parameters):
        raise ValueError(f"window.schedule {name} must return a callable (iteration, num_groups, *, generator, probe)")
    if not isinstance(getattr(schedule, "needs_anchors", None), bool):
        raise ValueError(
            f"window.schedule {name} must return a callable with needs_anchors: True to re-noise an anchor per group "
            "(HRF), False to start from pure noise (DDPO)"
        )
    if hasattr(schedule, "state") != hasattr(schedule, "load_state"):
        raise ValueError(
            f"window.schedule {name} must return a callable with both state() and load_state(state), to be saved and "
            "resumed, or neither"
        )
    return schedule


def list_schedules() -> list[tuple[str, str, tuple[Argument, ...]]]:
    """The registered schedules by name: what each is, and its options."""
    return [
        (name, summary(SCHEDULES[name]), arguments_of(SCHEDULES[name], ("num_inference_steps", "stop")))
        for name in sorted(SCHEDULES)
    ]


def check_starts(starts: Sequence[int], *, option: str, num_inference_steps: int, stop: int) -> list[int]:
    """Starts that can be trained: those in [0, stop). The steps in [stop, T) are deterministic and silently dropped.

    Raises:
        ValueError: a start outside the T steps, or none left.
    """
    wrong = [start for start in starts if not 0 <= start < num_inference_steps]
    if wrong:
        raise ValueError(
            f"{option} has start {wrong[0]} but sample.num_inference_steps is {num_inference_steps}; "
            f"use starts from 0 to {stop - 1}"
        )
    trainable = [start for start in starts if start < stop]
    if not trainable:
        raise ValueError(f"{option} is empty: {list(starts)} holds no step before the deterministic end at {stop}")
    return trainable


class _Uniform:
    """Starts drawn uniformly from a list that depends on the iteration; `latest` is the last of all."""

    needs_anchors = True

    def __init__(self, starts_at: Callable[[int], Sequence[int]], stop: int, *, latest: int) -> None:
        self.starts_at, self.stop, self.shortest = starts_at, stop, Window(latest, stop)

    def __call__(self, iteration: int, num_groups: int, *, generator: Generator, probe: Probe) -> list[Window]:
        return [Window(start, self.stop) for start in draw_starts(self.starts_at(iteration), num_groups, generator)]


@register_schedule("full")
class Full:
    """DDPO (arXiv 2305.13301): every stochastic step, from pure noise.

    Args:
        renoised: groups start from anchors taken back to step `start`, and train every step from there on: DDPO from
            noisy states, which shows what HRF's anchors do without its windows.
        start: the step that anchors are taken back to.
        end: steps from this one on are run and not trained, as Flow-GRPO's `timestep_fraction` leaves them out; null
            trains to the last stochastic step.
    """

    def __init__(
        self, *, num_inference_steps: int, stop: int, renoised: bool = False, start: int = 0, end: int | None = None
    ) -> None:
        if type(renoised) is not bool:
            raise ValueError(f"window.kwargs.renoised is {renoised!r}; use true or false")
        if type(start) is not int or not 0 <= start < stop:
            raise ValueError(f"window.kwargs.start is {start!r}; use a step from 0 to {stop - 1}")
        if start and not renoised:
            raise ValueError(
                f"window.kwargs.start is {start}, which pure noise does not have; set window.kwargs.renoised=true, or "
                "leave it at 0"
            )
        end = stop if end is None else end
        if type(end) is not int or not start < end <= stop:
            raise ValueError(f"window.kwargs.end is {end!r}; use a step from {start + 1} to {stop}")
        self.needs_anchors = renoised
        self.shortest = Window(start, end)

    def __call__(self, iteration: int, num_groups: int, *, generator: Generator, probe: Probe) -> list[Window]:
        return [self.shortest] * num_groups


@register_schedule("clusters")
def clusters(
    *, num_inference_steps: int, stop: int, clusters: list[Any] | None = None, iterations_per_cluster: int = 35
) -> WindowSchedule:
    """HRF (arXiv 2410.08315): uniform in one cluster of starts for some iterations, then in the next, and round again.

    Args:
        clusters: half-open ranges [first, stop), of steps or as shares of T such as [0.5, 1.0], or explicit
            `{steps: [...]}`; null for the two halves of the trajectory.
        iterations_per_cluster: how long one is used.
    """
    check_count("window.kwargs.iterations_per_cluster", iterations_per_cluster)
    if clusters is None:
        half = num_inference_steps // 2
        halves = [[0, half], [half, num_inference_steps]]
        # of one or two steps a half has nothing to train
        clusters = [bounds for bounds in halves if bounds[0] < min(bounds[1], stop)]
    if not isinstance(clusters, (list, tuple)):
        raise ValueError(f"window.kwargs.clusters is {clusters!r}; use a list of ranges such as [[0, 20], [20, 40]]")
    if not clusters:
        raise ValueError("window.kwargs.clusters is empty; list at least one range such as [0, 20]")
    starts = []
    for index, cluster in enumerate(clusters):
        option = f"window.kwargs.clusters[{index}]"
        starts.append(
            check_starts(
                _cluster_steps(cluster, option, num_inference_steps),
                option=option,
                num_inference_steps=num_inference_steps,
                stop=stop,
            )
        )
    latest = max(map(max, starts))
    return _Uniform(lambda iteration: starts[iteration // iterations_per_cluster % len(starts)], stop, latest=latest)


def _cluster_steps(cluster: Any, option: str, total: int) -> list[int]:
    """The steps of a cluster as it is written, of `total` steps."""
    explicit = isinstance(cluster, dict) and set(cluster) == {"steps"}
    numbers = cluster["steps"] if explicit else cluster
    if isinstance(numbers, (list, tuple)):
        kinds = {type(number) for number in numbers}
        if explicit and kinds <= {int}:
            return list(numbers)
        if not explicit and len(numbers) == 2:
            if kinds == {int}:
                first, end = numbers
                # of a number that was mistyped no more than is refused
                return list(range(first, min(end, total + 1))) if 0 <= first < total else [first]
            if kinds <= {int, float} and 0 <= numbers[0] < numbers[1] <= 1:
                return list(range(*(round(share * total) for share in numbers)))
    raise ValueError(
        f"{option} is {cluster!r}; use a half-open range [first, stop] of steps, shares of T such as [0.5, 1.0], or "
        "{steps: [...]} of whole numbers"
    )


@register_schedule("random")
def random(*, num_inference_steps: int, stop: int) -> WindowSchedule:
    """Uniform over every start that leaves a step to train: HRF without a hierarchy, a control for studies."""
    return _Uniform(lambda iteration: range(stop), stop, latest=stop - 1)


@register_schedule("sliding")
def sliding(*, num_inference_steps: int, stop: int, iterations_per_start: int = 1, stride: int = 1) -> WindowSchedule:
    """All groups share a start, which moves to later steps and wraps.

    Args:
        iterations_per_start: after so many iterations it moves.
        stride: by so many steps.
    """
    check_count("window.kwargs.iterations_per_start", iterations_per_start)
    check_count("window.kwargs.stride", stride)
    starts = range(0, stop, stride)
    return _Uniform(
        lambda iteration: [starts[iteration // iterations_per_start % len(starts)]], stop, latest=starts[-1]
    )


@register_schedule("progressive")
def progressive(
    *, num_inference_steps: int, stop: int, first_steps: int | None = None, iterations: int = 100
) -> WindowSchedule:
    """B²-DiffuRL (arXiv 2503.11240): the late steps first, then more of them, back to step 0.

    Iteration i trains the last first_steps + ⌊i·(T − first_steps + 1)/iterations⌋ of T steps, at most all, as its
    authors' run does (the last 14 of 20, then up to 20 over 100 stages). Its groups branch off one trajectory, ours are
    re-noised from an anchor.

    Args:
        first_steps: steps that are trained at first; null for 0.7·T.
        iterations: until all steps are.
    """
    total = num_inference_steps
    # the deterministic end has nothing to train
    least = total - stop + 1
    first = max(least, round(0.7 * total)) if first_steps is None else first_steps
    check_count("window.kwargs.iterations", iterations)
    if type(first) is not int or not least <= first <= total:
        raise ValueError(f"window.kwargs.first_steps is {first!r}; use from {least} to all {total} steps")

    def starts(iteration: int) -> Sequence[int]:
        return [total - min(total, first + iteration * (total - first + 1) // iterations)]

    return _Uniform(starts, stop, latest=total - first)


@register_schedule("interior")
class Interior:
    """Windows [s, s + width) inside the trajectory, s uniform over the starts that leave all of it stochastic.

    The steps after a window run to the clean image, with noise as the sampler has them, and are not trained. The
    schedules mixgrpo and flow_grpo_fast have such windows from pure noise, with deterministic steps around them.

    Args:
        width: steps of a window.
        starts: narrows s to a half-open range, or {steps: [...]}, as in the schedule clusters; null for all.
    """

    needs_anchors = True

    def __init__(self, *, num_inference_steps: int, stop: int, width: int = 4, starts: Any = None) -> None:
        check_width(width, stop)
        chosen = (
            range(stop - width + 1)
            if starts is None
            else _cluster_steps(starts, "window.kwargs.starts", num_inference_steps)
        )
        wrong = [start for start in chosen if not 0 <= start <= stop - width]
        if wrong or not chosen:
            raise ValueError(
                f"window.kwargs.starts is {starts!r}; use starts from 0 to {stop - width}, so that windows of {width} "
                f"steps end before the deterministic end at {stop}"
            )
        self.starts, self.width, self.shortest = chosen, width, Window(0, width)

    def __call__(self, iteration: int, num_groups: int, *, generator: Generator, probe: Probe) -> list[Window]:
        return [Window(start, start + self.width) for start in draw_starts(self.starts, num_groups, generator)]
