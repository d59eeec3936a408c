"""A network call in its parts: what the host takes to start it, what it takes in all, and which kernels take it.

    hrf bench call                                                    # the shipped model, on this machine
    hrf bench call --model celebahq --images 1 10 --precision bf16 --channels-last --out call

A call is a forward without gradient, or a forward and its backward, as training makes them. *Host* is the time until
the call returns, *wall* until the device is done: where they are equal, the host is too slow for the device and its
kernels' time is hidden. *Kernels* is the sum of the device's kernels by torch's profiler, in another call; on a CPU of
torch's operations. Random weights serve: a call costs the same. Writes call.json and call.md into --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import describe, machine
from benchmarks.tables import markdown_table
from benchmarks.training_bench.models import MODELS, make_model
from hrf_fast.config.options import ModelConfig
from hrf_fast.config.run_options import PRECISIONS, ComputeConfig
from hrf_fast.devices import choose_device, peak_memory_bytes, set_precision_flags, trial_backward
from hrf_fast.policies.base import Policy
from hrf_fast.policies.compilation import check_compile
from hrf_fast.policies.load import load_policy

_KINDS = ("forward", "forward and backward")


def measure_call(policy: Policy, images: int, kind: str, *, rounds: int, top: int) -> dict[str, Any]:
    """Time one kind of call of `images` random latents, then profile one; seconds, bytes and kernels."""
    wait = torch.cuda.synchronize if policy.device.type == "cuda" else _nothing
    call = _call(policy, images, kind)
    if policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(policy.device)
    began = time.perf_counter()
    call(), wait()
    first = time.perf_counter() - began
    # the second one has what the first has allocated
    call(), wait()
    host, wall = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        host.append(time.perf_counter() - began)
        wait()
        wall.append(time.perf_counter() - began)
    kernels = _profile(call, wait, policy.device)
    return {
        "call": kind,
        "images": images,
        "first_seconds": first,
        "host_seconds": statistics.median(host),
        "wall_seconds": statistics.median(wall),
        "wall_range": [min(wall), max(wall)],
        "peak_bytes": peak_memory_bytes(policy.device),
        "kernel_seconds": sum(kernel["seconds"] for kernel in kernels),
        "launches": sum(kernel["launches"] for kernel in kernels),
        "kernels": kernels[:top],
    }


def _nothing() -> None:
    pass


def _call(policy: Policy, images: int, kind: str) -> Callable[[], None]:
    latents = torch.randn(images, *policy.latent_shape, device=policy.device)
    condition = policy.condition([None] * images)
    weights = [parameter for parameter in policy.network.parameters() if parameter.requires_grad]

    def forward() -> Tensor:
        return policy.predict(latents, 0, condition).model_output

    def run() -> None:
        if kind == "forward":
            with torch.no_grad():
                forward()
        else:
            trial_backward(forward, weights)

    return run


def _profile(call: Callable[[], None], wait: Callable[[], None], device: torch.device) -> list[dict[str, Any]]:
    """The kernels of one call, the longest first: {name, seconds, launches}."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as profiler:
        call(), wait()
    kernels = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        # on CUDA there are events of the runtime too, which have no time on the device
        if microseconds > 0:
            kernels.append({"name": event.key, "seconds": microseconds / 1e6, "launches": event.count})
    return sorted(kernels, key=lambda kernel: -float(kernel["seconds"]))


def page(result: dict[str, Any]) -> str:
    """The measurements in Markdown."""
    header = ["call", "images", "host ms", "wall ms [least, most]", "kernels ms", "launches", "peak GB"]
    rows, tables = [], []
    for call in result["calls"]:
        least, most = (1e3 * value for value in call["wall_range"])
        wall = f"{1e3 * call['wall_seconds']:.1f} [{least:.1f}, {most:.1f}]"
        times = [f"{1e3 * call['host_seconds']:.1f}", wall, f"{1e3 * call['kernel_seconds']:.1f}"]
        rows.append([call["call"], call["images"], *times, call["launches"], call["peak_bytes"] / 1e9])
        kernels = [[f"{1e3 * k['seconds']:.2f}", k["launches"], f"`{k['name'][:110]}`"] for k in call["kernels"]]
        title = f"{call['call']}, {call['images']} images"
        tables.append(f"## {title}\n\n{markdown_table(['ms', 'launches', 'kernel'], kernels)}")
    about = f"{result['title']}\n\n{describe(result['machine'])}"
    return "\n\n".join([f"# A call in its parts\n\n{about}", markdown_table(header, rows), *tables]) + "\n"


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options and check them.

    Raises:
        ValueError: names the option, its value and the rule.
    """
    parser = argparse.ArgumentParser(
        prog="hrf bench call", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="fashion", choices=MODELS)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8], help="images in a call")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", choices=("none", "unet", "blocks"), default="none")
    parser.add_argument(
        "--deterministic", action="store_true", help="on CUDA: fp32 is fp32, and no fastest convolutions"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="calls whose median is taken")
    parser.add_argument("--top", type=int, default=15, help="kernels that are shown")
    parser.add_argument("--out", type=Path, help="folder of call.json and call.md")
    options = parser.parse_args(words)
    for name in ("rounds", "top", "images"):
        value = getattr(options, name)
        if min([value] if isinstance(value, int) else value) < 1:
            raise ValueError(f"--{name} is {value}; use 1 or more")
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print.

    Raises:
        ValueError: an option, or what this machine can't run.
    """
    options = parse(words)
    device = choose_device(options.device)
    check_compile(options.compile, device)
    set_precision_flags(device, deterministic=options.deterministic or device.type != "cuda")
    switches = [options.precision, *(["channels_last"] if options.channels_last else [])]
    switches += [f"compile {options.compile}"] if options.compile != "none" else []
    with tempfile.TemporaryDirectory() as folder:
        model = ModelConfig(make_model(options.model, Path(folder), seed=0))
        compute = ComputeConfig(options.precision, channels_last=options.channels_last)
        policy = load_policy(model, compute=compute, device=device)
    if options.compile != "none":
        policy.compile(options.compile)
    if device.type == "cuda":
        switches.append("deterministic" if options.deterministic else "TF32 and cudnn's fastest convolutions")
    title = f"{options.model}, {', '.join(switches)}"
    result: dict[str, Any] = {"title": title, "machine": machine(device, torch.get_num_threads()), "calls": []}
    for images in options.images:
        for kind in _KINDS:
            result["calls"].append(measure_call(policy, images, kind, rounds=options.rounds, top=options.top))
    text = page(result)
    print(text, end="")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "call.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "call.md").write_text(text)
