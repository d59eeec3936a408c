"""Timing: how long a network's calls take on this machine, and what of threads and memory format is fastest there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hrf_fast.cpu import usable_cpus
from hrf_fast.devices import trial_backward
from hrf_fast.policies.base import Condition, Policy
from hrf_fast.policies.network import Network

# timed rounds after one that warms up
_ROUNDS = 3


def sampling_call(network: Network, shape: tuple[int, ...], condition: Condition, images: int) -> Callable[[], None]:
    """A call without gradient on `images` latents of `shape`, which has the condition's branches as rows."""
    latents = _latents(network, shape, images * condition.branches)

    def call() -> None:
        with torch.no_grad():
            network(latents, 0, **condition.inputs)

    return call


def update_call(network: Network, shape: tuple[int, ...], condition: Condition, images: int) -> Callable[[], None]:
    """A call and its backward; arguments as `sampling_call`. Its gradients are thrown away."""
    latents = _latents(network, shape, images * condition.branches)
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return lambda: trial_backward(lambda: network(latents, 0, **condition.inputs), weights)


def _latents(network: Network, shape: tuple[int, ...], rows: int) -> Tensor:
    return torch.randn(rows, *shape, device=next(network.parameters()).device)


def seconds(call: Callable[[], None]) -> float:
    """The median seconds of a call, of a few after one that warms up."""
    call()
    times = []
    for _ in range(_ROUNDS):
        times.append(_once(call))
    return statistics.median(times)


def _once(call: Callable[[], None]) -> float:
    cuda = torch.cuda.is_initialized()
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def candidate_threads() -> list[int]:
    """One thread, half of the usable processors, and all of them."""
    usable = usable_cpus()
    return sorted({1, max(1, usable // 2), usable})


def fastest(policy: Policy, *, sampled: int, trained: int, threads: Sequence[int]) -> tuple[int, bool, str]:
    """Time the calls of a run under numbers of threads and, for a UNet, both memory formats, in turns.

    Threads and memory format of the process and the policy are as before afterwards.

    Args:
        sampled: images of a call without gradient; trained: of one with its backward.

    Returns:
        Threads, whether channels_last, and a line that says what was measured.
    """
    network, before = policy.network, torch.get_num_threads()
    conditions = policy.condition([None] * sampled), policy.condition([None] * trained)
    calls = (
        sampling_call(network, policy.latent_shape, conditions[0], sampled),
        update_call(network, policy.latent_shape, conditions[1], trained),
    )
    # compute.channels_last is an option of UNets: latents of a transformer may be tokens
    formats = (False, True) if hasattr(network.unet, "down_blocks") else (False,)
    times: dict[tuple[int, bool], list[float]] = {(n, last): [] for n in threads for last in formats}
    try:
        for _ in range(_ROUNDS + 1):
            for number, last in times:
                torch.set_num_threads(number)
                _set_format(network, last)
                times[number, last].append(sum(_once(call) for call in calls))
    finally:
        torch.set_num_threads(before)
        _set_format(network, False)
    medians = {key: statistics.median(rounds[1:]) for key, rounds in times.items()}
    best = min(medians, key=lambda key: medians[key])
    measured = ", ".join(
        f"{number} threads{' channels_last' if last else ''} {1000 * value:.3g} ms"
        for (number, last), value in medians.items()
    )
    return *best, f"compute.auto_tune: threads {best[0]}, channels_last {str(best[1]).lower()}; measured {measured}"


def _set_format(network: Network, channels_last: bool) -> None:
    network.channels_last = channels_last
    order = torch.channels_last if channels_last else torch.contiguous_format
    network.unet.to(memory_format=order)  # type: ignore[call-overload]
