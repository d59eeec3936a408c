"""The clipped loss and its gradient, ours against eager formulas and torch.compile: errors, then counts, then times.

    hrf bench kernels                                          # a few shapes, a minute or two
    hrf bench kernels --full --out kernels.json                # all shapes, B 8 to 64
    hrf bench kernels --shapes 3x256x256 --batch 16 --threads 1 --providers "literal eager" analytic

Every provider's log-prob, loss and gradient is compared with the float64 formula before anything is timed; a
disagreement stops the run with exit code 1. A step is one forward and one backward. Times are medians of interleaved
rounds, ratios are medians of the rounds' ratios. Without a GPU there are counts and CPU times, and no GPU column.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.kernel_bench import timing
from benchmarks.kernel_bench.counting import TRITON, Count, count, count_analytic, count_compiled
from benchmarks.kernel_bench.page import page
from benchmarks.kernel_bench.providers import NAMES, Case, Result, check, compile_fails, exact, make_case, providers
from benchmarks.machine import machine
from hrf_fast.devices import choose_device

SHAPES = ("3x32x32", "4x64x64", "16x128x128", "3x256x256")
BATCHES = (8, 16, 32, 64)
DEFAULT_SHAPES, DEFAULT_BATCHES = ("3x32x32", "4x64x64", "3x256x256"), (16,)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FUSED = ("two-stage", "one-program")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options and check them.

    Raises:
        ValueError: names the option, the value and what is accepted.
    """
    parser = argparse.ArgumentParser(
        prog="hrf bench kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", metavar="CxHxW", help=f"by default {' '.join(DEFAULT_SHAPES)}")
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help=f"by default {DEFAULT_BATCHES[0]}")
    parser.add_argument("--full", action="store_true", help=f"shapes {' '.join(SHAPES)} and B {BATCHES}")
    parser.add_argument("--clamp", choices=("off", "on", "both"), default="both", help="the x0 clamp")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the model output; latents are fp32")
    parser.add_argument("--providers", nargs="+", default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--unet", default="fashion", help="the model of whose step the loss is a share, or none")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing per case, beyond five rounds")
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall", help="cpu: processor time, with --threads 1")
    parser.add_argument("--threads", type=int, help="of the CPU; by default torch's choice")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(words)
    options.batch = options.batch or (BATCHES if options.full else DEFAULT_BATCHES)
    options.shapes = [_shape(text) for text in options.shapes or (SHAPES if options.full else DEFAULT_SHAPES)]
    for name, value in [("batch", b) for b in options.batch] + [("threads", options.threads)]:
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; use at least 1")
    if not 0 <= options.seconds < float("inf"):
        raise ValueError(f"--seconds is {options.seconds}; use 0 or more")
    if options.clock == "cpu" and options.threads != 1:
        raise ValueError("--clock cpu adds up the time of all threads; use it with --threads 1")
    for name in options.providers:
        if name not in NAMES:
            raise ValueError(f"--providers has {name!r}; use one or more of {', '.join(map(repr, NAMES))}")
    if options.out and not options.out.parent.is_dir():
        raise ValueError(f"--out is {options.out}, but there is no folder {options.out.parent}")
    return options


def _shape(text: str) -> tuple[int, ...]:
    sides = text.split("x")
    if len(sides) != 3 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"--shapes has {text!r}; use CxHxW with sizes of at least 1, such as {' or '.join(SHAPES)}")
    return tuple(map(int, sides))


def run_case(
    case: Case, runs: dict[str, Callable[[Case], Result]], counted: dict[str, Any], clock: str, seconds: float
) -> dict[str, Any]:
    """Check every provider, then time them: {provider: {errors, cpu_ms …}}.

    Raises:
        Disagreement: a provider is wrong; nothing was timed.
    """
    truth = exact(case)
    record: dict[str, Any] = {name: {"errors": check(name, run(case), truth)} for name, run in runs.items()}
    if case.latents.is_cuda:
        cases = case.copies(timing.rotation(case.nbytes, case.latents.device))
        for name, run in runs.items():
            tensors = (counted.get(name) or {}).get("tensors")
            record[name]["gpu"] = timing.gpu_times(run, cases, tensors and tensors * 4 * case.latents.numel())
        return record
    steps = {name: partial(run, case) for name, run in runs.items()}
    times = timing.interleaved(steps, clock=clock, seconds=seconds)
    for name, rounds in times.items():
        record[name] |= {"cpu_ms": statistics.median(rounds), "cpu_fastest_ms": min(rounds), "rounds": len(rounds)}
        record[name]["vs"] = {other: timing.median_ratio(times[other], rounds) for other in times if other != name}
    return record


def count_all(names: Sequence[str], options: argparse.Namespace, device: torch.device, clamp: bool) -> dict[str, Any]:
    """Traffic per provider on a small case: per element it is the same at every size."""
    case = make_case((3, 32, 32), 2, clamp=clamp, dtype=DTYPES[options.dtype], device=device, seed=options.seed)
    counts: dict[str, Count | None] = {name: TRITON[options.dtype][name] for name in FUSED if name in names}
    for name, run in providers(tuple(n for n in names if n not in FUSED), (3, 32, 32)).items():
        if name == "torch.compile":
            counts[name] = count_compiled(run, case)
        elif name == "analytic":
            counts[name] = count_analytic(case)
        else:
            counts[name] = count(run, case)
    return {name: counts[name] and counts[name]._asdict() for name in NAMES if name in counts}


def unet_share(options: argparse.Namespace, device: torch.device) -> dict[str, Any] | None:
    """Measure the loss's share of a training step's forward and backward, beside the UNet that it follows."""
    if options.unet == "none":
        return None
    from hrf_fast.config.options import ModelConfig
    from hrf_fast.config.run_options import ComputeConfig
    from hrf_fast.policies.load import load_policy

    compute = ComputeConfig("bf16" if options.dtype == "bf16" else "fp32")
    policy = load_policy(ModelConfig(options.unet), compute=compute, device=device)
    batch, shape = options.batch[0], policy.latent_shape
    case = make_case(shape, batch, clamp=True, dtype=DTYPES[options.dtype], device=device, seed=options.seed)
    condition, step = policy.condition([None] * batch), len(policy.sampler) // 2

    def unet() -> None:
        output = policy.predict(case.latents, step, condition).model_output
        output.backward(case.model_output.to(output.dtype))

    names = ("literal eager", *(FUSED if device.type == "cuda" else ("analytic",)))
    steps: dict[str, Callable[[], Any]] = {"unet": unet}
    steps |= {name: partial(run, case) for name, run in providers(names, shape).items()}
    if device.type == "cuda":
        # from the host, by the kernels' own functions: training adds checks, the custom operation and autograd
        times = {name: timing.launched_ms(step)[0] for name, step in steps.items()}
    else:
        rounds = timing.interleaved(steps, clock=options.clock, seconds=options.seconds)
        times = {name: statistics.median(values) for name, values in rounds.items()}
    shares = {name: value / (value + times["unet"]) for name, value in times.items() if name != "unet"}
    return {"model": options.unet, "shape": list(shape), "batch": batch, "ms": times, "share_of_step": shares}


def benchmark(options: argparse.Namespace, *, until: float = math.inf) -> dict[str, Any]:
    """Everything that was asked for, as the JSON file has it.

    Args:
        until: the time.monotonic() from which no case is begun; what was not measured is in `unfinished`.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        device = choose_device(options.device)
    except ValueError as error:
        raise ValueError(str(error).replace("run.device", "--device")) from error
    names = [n for n in NAMES if n in options.providers and (device.type == "cuda" or n not in FUSED)]
    clamps = {"off": (False,), "on": (True,), "both": (False, True)}[options.clamp]
    grid = list(itertools.product(options.shapes, options.batch, clamps))
    result = {"machine": machine(device, torch.get_num_threads())}
    cuda = device.type == "cuda"
    result |= {"peak_gb_per_s": timing.peak_gb_per_second() if cuda else None}
    result |= {"read_write_gb_per_s": timing.read_write_gb_per_second(device) if cuda else None}
    result |= {name: getattr(options, name) for name in ("seed", "dtype", "clock")}
    result |= {"left_out": {}, "counted": {}, "cases": [], "unet": None, "unfinished": []}
    if "torch.compile" in names and (reason := compile_fails(device)):
        names.remove("torch.compile")
        result["left_out"]["torch.compile"] = reason
    with tqdm(total=len(clamps) + len(grid) + 1, unit="case", file=sys.stderr) as bar:

        def advance(text: str) -> None:
            bar.update()
            bar.set_postfix_str(text)

        # the fused ones are counted by tests, so that they are shown on any machine
        counted = [*names, *(n for n in FUSED if n in options.providers)]
        for clamp in clamps:
            result["counted"][f"clamp {'on' if clamp else 'off'}"] = count_all(counted, options, device, clamp)
            advance("counted")
        for shape, batch, clamp in grid:
            name = f"{'x'.join(map(str, shape))} B {batch} clamp {'on' if clamp else 'off'}"
            if time.monotonic() > until:
                result["unfinished"].append(name)
                continue
            case = make_case(shape, batch, clamp=clamp, dtype=DTYPES[options.dtype], device=device, seed=options.seed)
            counts = result["counted"][f"clamp {'on' if clamp else 'off'}"]
            record = run_case(case, providers(tuple(names), shape), counts, options.clock, options.seconds)
            result["cases"].append({"shape": list(shape), "batch": batch, "clamp": clamp, "providers": record})
            advance(name)
        if time.monotonic() > until:
            result["unfinished"].append("UNet")
        else:
            result["unet"] = unet_share(options, device)
        advance("UNet")
    return result


def main(words: Sequence[str] | None = None) -> None:
    options = parse(words)
    result = benchmark(options)
    print(page(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {options.out}", file=sys.stderr)
