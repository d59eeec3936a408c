"""Clocks of the kernel benchmark: interleaved rounds on a CPU, CUDA graphs on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

MIN_ROUNDS = 5
# calls shorter than this are timed several at a time
SAMPLE_SECONDS = 2e-3
# of a time on a GPU: the median, and what is said beside it
QUANTILES = [0.5, 0.2, 0.8]
# of a graph that is timed
REPLAYS = 30


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


def gpu_times(run: Callable[[Any], Any], cases: Sequence[Any], count: float | None) -> dict[str, Any]:
    """Time `run` of a case: milliseconds in three ways, launches, and for `count` bytes GB/s and share of the peak.

    Cold: a CUDA graph of all cases in turn, so that each call reads from memory what the calls between have put out of
    the cache. Warm: a graph of one case as often, whose inputs stay in the cache. Launched: the cache emptied and the
    call launched from the host, whose time counts where the GPU waits for it. All are medians, with the 20th and the
    80th percentile as `…_ms_spread`. A provider that can't be captured has the reason in place of the first two.

    Args:
        cases: equal ones in memory of their own; see `rotation`.
    """
    first = partial(run, cases[0])
    middle, *spread = launched_ms(first)
    result: dict[str, Any] = {"launched_ms": middle, "launched_ms_spread": spread, "launches": launches(first)}
    for kind, calls in (("cold", [partial(run, case) for case in cases]), ("warm", [first] * len(cases))):
        try:
            result[f"{kind}_ms"], *result[f"{kind}_ms_spread"] = graph_ms(calls, keep=kind == "cold")
        except RuntimeError as error:
            torch.cuda.synchronize()
            result |= {f"{kind}_ms": None, "not_captured": str(error).splitlines()[0]}
    peak = peak_gb_per_second()
    for kind in ("cold", "warm"):
        taken = result[f"{kind}_ms"]
        rate = count / taken / 1e6 if count and taken else None
        # a share above 1 is what the cache holds, not the memory
        result |= {f"{kind}_gb_per_s": rate, f"{kind}_share_of_peak": rate / peak if rate and peak else None}
    return result


def launched_ms(function: Callable[[], Any]) -> list[float]:
    """Milliseconds of a call that the host launches after the cache was emptied: the quantiles."""
    import triton.testing

    return list(triton.testing.do_bench(function, quantiles=QUANTILES))


def rotation(size: int, device: torch.device) -> int:
    """How many cases of `size` bytes are four times the L2 cache together; at least 2, at most 64.

    Small cases wait for launches, not for memory, and a graph of thousands of launches takes long to make.
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(-(-4 * cache // size), 2), 64)


def graph_ms(calls: Sequence[Callable[[], Any]], *, keep: bool) -> list[float]:
    """Milliseconds per call in a CUDA graph of all of them: the quantiles of its replays.

    Args:
        keep: the results, each in memory of its own, as in a loop that goes on to use them.
    """
    stream, graph, results = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # what is made at the first call is no part of the graph
        for call in calls:
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            result = call()
            if keep:
                results.append(result)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return torch.tensor(times).quantile(torch.tensor(QUANTILES)).tolist()


def read_write_gb_per_second(device: torch.device) -> float | None:
    """Measure a kernel that reads 1 GB and writes as much: GB/s, both added up; None where there is no room for two."""
    try:
        source = torch.rand(2**28, device=device)
        target = torch.empty_like(source)
    except torch.cuda.OutOfMemoryError:
        return None
    # not copy_, which in a graph is no kernel: an H200's kernels outran it by a third
    milliseconds = graph_ms([lambda: torch.neg(source, out=target)] * 4, keep=False)[0]
    return 2 * source.nbytes / milliseconds / 1e6


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
