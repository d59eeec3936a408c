"""Clocks of the kernel benchmark: interleaved rounds on a CPU, cold and warm times on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

MIN_ROUNDS = 5
# calls shorter than this are timed several at a time
SAMPLE_SECONDS = 2e-3


# processor time does not pass while others have the core
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(
    functions: dict[str, Callable[[], Any]], *, clock: str = "wall", seconds: float
) -> dict[str, list[float]]:
    """Milliseconds per call, one number per round; every round runs all functions, so that load hits them alike."""
    now = CLOCKS[clock]
    repeats = {}
    for name, function in functions.items():
        function()
        start = now()
        function()
        repeats[name] = max(1, round(SAMPLE_SECONDS / max(now() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < MIN_ROUNDS or time.perf_counter() < end:
        rounds += 1
        for name, function in functions.items():
            start = now()
            for _ in range(repeats[name]):
                function()
            times[name].append((now() - start) / repeats[name] * 1e3)
    return times


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the rounds' own ratios: what disturbs one round disturbs both of its times."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def gpu_times(function: Callable[[], Any], count: float | None) -> dict[str, Any]:
    """Time one call: cold and warm milliseconds, launches, and for `count` bytes of traffic GB/s and share of the peak.

    Cold: the L2 cache is emptied before each call, and waiting for the host counts. Warm: a CUDA graph replayed,
    nothing but the GPU. Both are medians, with the 20th and the 80th percentile as `…_ms_spread`. A provider that can't
    be captured has the reason in place of a warm time.
    """
    import triton.testing

    quantiles = [0.5, 0.2, 0.8]
    middle, *spread = triton.testing.do_bench(function, quantiles=quantiles)
    result: dict[str, Any] = {"cold_ms": middle, "cold_ms_spread": spread, "launches": launches(function)}
    try:
        result["warm_ms"], *result["warm_ms_spread"] = triton.testing.do_bench_cudagraph(function, quantiles=quantiles)
    except RuntimeError as error:
        torch.cuda.synchronize()
        result |= {"warm_ms": None, "no_warm_time": str(error).splitlines()[0]}
    peak = peak_gb_per_second()
    for kind in ("cold", "warm"):
        taken = result[f"{kind}_ms"]
        rate = count / taken / 1e6 if count and taken else None
        # a share above 1 is what the cache holds, not the memory
        result |= {f"{kind}_gb_per_s": rate, f"{kind}_share_of_peak": rate / peak if rate and peak else None}
    return result


def launches(function: Callable[[], Any]) -> int:
    """Kernels, copies and fills that a call starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in recorded.events())


def peak_gb_per_second() -> float | None:
    """Memory bandwidth by clock and bus width; None where the driver doesn't tell."""
    import triton.testing

    try:
        return triton.testing.get_dram_gbps() or None
    except (RuntimeError, KeyError, AttributeError, NotImplementedError):
        return None
