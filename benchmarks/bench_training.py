"""Training speed: the published loop against hrf_fast, on the same UNet, noise and machine.

    hrf bench training                                   # the shipped model and a 35 M UNet; with a GPU also 113.7 M
    hrf bench training --models fashion --methods hrf --rounds 9
    hrf bench training --models fashion portraits --methods hrf --starts 10 30
    hrf bench training --against ../earlier --models fashion --methods hrf      # this checkout against another
    hrf bench training --quick                           # does it run? its figures mean nothing

For every model and method each configuration trains in a process of its own, and they take turns. First the rows that
promise the literal loop's numbers are held to them: on other weights nothing is timed. Then JSON and Markdown are
written: medians over turns of trained images per second and of their ratio to the literal loop's in the same turn, UNet
calls counted by a forward hook, peak memory, the overhead, an iteration's time over that of its bare UNet calls, and
the model FLOPs utilisation, the time of those calls' operations in a large matrix product over the iteration's.

With --against every row that both checkouts have runs by the code of either, in turns, and the ratio is to the other
checkout's. Two copies of one commit show what noise is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.machine import commit, describe, machine
from benchmarks.tables import markdown_table
from benchmarks.training_bench.ceiling import add_utilisation, unet_flops
from benchmarks.training_bench.configurations import METHODS, Row, method_words, table_of
from benchmarks.training_bench.models import MODELS, make_model, without_clipping
from benchmarks.training_bench.turns import CHECKED, measure, note
from benchmarks.training_bench.workers import table_of_tree
from hrf_fast.devices import choose_device
from hrf_fast.registry import nearest

ROOT = Path(__file__).resolve().parents[1]
Table = list[tuple[Row, list[str]]]

# what a row costs at most on a CPU is minutes an iteration: these are left to whoever asks for them
_ON_CPU = {"fashion": tuple(METHODS), "portraits": tuple(METHODS), "tiny": tuple(METHODS), "cifar": ("hrf",)}

# a turn of HRF has one iteration of each cluster
PER_ROUND = {"ddpo": 1, "hrf": 2, "hrf_d": 1}
HEAD = (
    "configuration",
    "trained images/s",
    "speed-up [min, max]",
    "seconds [min, max]",
    "UNet calls per image",
    "images through it",
    "with gradient",
    "mean start",
    "peak MB",
    "time over bare UNet",
    "MFU",
    "largest weight difference",
)


def per_round(method: str, arguments: argparse.Namespace) -> int:
    """Iterations of a turn, such that every window has its one."""
    return len(arguments.starts) if arguments.starts else PER_ROUND[method]


def tables_of(model: str, method: str, arguments: argparse.Namespace) -> list[Table]:
    """Rows to measure together: all of a method beside the literal loop, or with --against each row beside itself.

    Raises:
        ValueError: --rows chooses none, or the other checkout has none of them.
    """
    table = table_of(method, method_words(model, method, arguments), arguments)
    if arguments.against is None:
        return [table]
    names = ("steps", "groups", "group_size", "seed", "rows", "starts")
    asked = {name: getattr(arguments, name) for name in names} | {"device": str(arguments.device)}
    theirs = {row.name: words for row, words in table_of_tree(arguments.against, model, method, asked)}
    pairs = []
    for row, words in table:
        if row.name in theirs:
            other = replace(row, name=f"{row.name}, {commit(arguments.against)}", tree=arguments.against)
            pairs.append([(other, theirs[row.name]), (replace(row, tree=ROOT), words)])
        else:
            note(f"{method}: {row.name!r} is no row of {arguments.against}")
    return pairs


def markdown(result: dict[str, Any]) -> str:
    """One table per model and method."""
    settings = result["settings"]
    size = f"{settings['groups']} groups of {settings['group_size']}"
    size += f", windows from {' and '.join(map(str, settings['starts']))} in turn" if settings["starts"] else ""
    baseline = f"commit {result['against']}" if result["against"] else "the literal loop"
    lines = [
        f"### Training against {baseline}",
        "",
        f"T {settings['steps']}, {size} an iteration, medians of {settings['rounds']} turns, {settings['clock']} time. "
        + describe(result["machine"]),
    ]
    if settings["quick"]:
        lines.append("\n**A quick run: it shows that everything runs; the figures mean nothing.**")
    for part in result["results"]:
        lines += ["", f"**{part['model']}, {part['method']}**", "", markdown_table(HEAD, map(_cells, part["rows"]))]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    per = row["images_per_turn"]
    low, high = min(row["seconds"]), max(row["seconds"])
    return [
        row["name"],
        f"{row['images_per_second']:.2f}",
        f"{row['speedup']:.2f}× [{min(row['speedups']):.2f}, {max(row['speedups']):.2f}]",
        f"{row['seconds_median']:.2f} [{low:.2f}, {high:.2f}]",
        f"{row['unet_batches'] / per:.1f}",
        f"{row['unet_images'] / per:.1f}",
        f"{row['unet_images_with_gradient'] / per:.1f}",
        f"{row['mean_start']:.1f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['overhead']:.3f}" if row["overhead"] else "",
        f"{row['mfu']:.0%}",
        f"{row['check']['largest_weight_difference']:.1e}" if row["check"] else "",
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hrf bench training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", help=f"of {', '.join(MODELS)}; default fashion, cifar, on CUDA celebahq")
    parser.add_argument("--methods", nargs="+", help=f"of {', '.join(METHODS)}; default all that take minutes at most")
    parser.add_argument("--rows", nargs="+", default=["*"], help="only configurations of these names; * is any text")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout of this repository, as baseline")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each row")
    parser.add_argument("--groups", type=int, default=4, help="per iteration")
    parser.add_argument("--group-size", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="T")
    parser.add_argument(
        "--starts", type=int, nargs="+", help="HRF's windows, one iteration each, not drawn from halves"
    )
    parser.add_argument("--threads", type=int, help="of torch; default as torch chooses")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for a busy machine"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of training.json and training.md")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one turn, to see that everything runs")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments with their defaults filled in.

    Raises:
        ValueError: names the argument, its value and the rule.
    """
    arguments = build_parser().parse_args(argv)
    if arguments.quick:
        arguments.models, arguments.rounds, arguments.groups = arguments.models or ["tiny"], 1, 2
        arguments.group_size, arguments.steps, arguments.threads = 3, 6, 1
    for name, least in (("rounds", 1), ("groups", 1), ("group_size", 2), ("steps", 5)):
        value = getattr(arguments, name)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; use at least {least}")
    for start in arguments.starts or []:
        # the last step is deterministic
        if not 0 <= start < arguments.steps - 1:
            raise ValueError(f"--starts has {start}; use steps from 0 to {arguments.steps - 2}")
    if arguments.starts and (arguments.methods != ["hrf"] or arguments.against):
        raise ValueError("--starts are HRF's, and another checkout may not have them; use --methods hrf, no --against")
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads is {arguments.threads}; use at least 1")
    if arguments.against is not None:
        if not (arguments.against / "benchmarks" / "bench_training.py").is_file():
            raise ValueError(
                f"--against is {arguments.against}, which has no benchmarks; use a checkout of this project"
            )
        if sys.platform == "win32":
            raise ValueError("--against hands a pipe to another process, which Windows does not; use Linux or macOS")
        arguments.against = arguments.against.resolve()
    arguments.device = choose_device(arguments.device)
    if arguments.clock == "cpu" and (
        arguments.threads != 1 or arguments.device.type != "cpu" or sys.platform != "linux"
    ):
        raise ValueError("--clock cpu adds up the threads of a process on Linux; use it with --threads 1 --device cpu")
    if arguments.models is None:
        arguments.models = ["fashion", "cifar", *(["celebahq"] if arguments.device.type == "cuda" else [])]
    for option, known in (("models", MODELS), ("methods", METHODS)):
        for name in getattr(arguments, option) or []:
            if name not in known:
                raise ValueError(f"--{option} has {name!r}{nearest(name, known)}; use {', '.join(known)}")
    return arguments


def plan(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """(model, method) pairs to measure; by default a CPU is spared what takes hours."""
    pairs = []
    for model in arguments.models:
        spared = arguments.device.type == "cpu" and arguments.methods is None
        for method in arguments.methods or METHODS:
            if spared and method not in _ON_CPU.get(model, ()):
                note(f"{model}, {method}: skipped: too long on a CPU unless --methods {method} asks for it")
            else:
                pairs.append((model, method))
    return pairs


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write training.json and training.md.

    Raises:
        ValueError: an argument, or a row that differs from the literal loop.
    """
    arguments = parse(argv)
    threads = arguments.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    result: dict[str, Any] = {
        "machine": machine(arguments.device, threads),
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("out", "device", "against")},
        "against": arguments.against and commit(arguments.against),
        "results": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=0, unit="iteration") as bar:
        folder = Path(temporary)

        def advance(iterations: int, doing: str) -> None:
            if doing:
                bar.set_postfix_str(doing, refresh=False)
            bar.update(iterations)

        tables, unets = {}, {}
        for model, method in plan(arguments):
            spec = without_clipping(make_model(model, folder, arguments.seed), folder)
            tables[model, method] = tables_of(spec, method, arguments)
            unets[model] = Path(spec) / "unet"
            workers = sum(map(len, tables[model, method]))
            bar.total += workers * (CHECKED + arguments.rounds * per_round(method, arguments))
        for (model, method), together in tables.items():
            measured: list[dict[str, Any]] = []
            for number, table in enumerate(together):
                measured += measure(
                    table,
                    where=f"{model}, {method}",
                    folder=folder / f"{model}-{method}-{number}",
                    threads=threads,
                    rounds=arguments.rounds,
                    per_round=per_round(method, arguments),
                    images=arguments.groups * arguments.group_size,
                    clock=arguments.clock,
                    advance=advance,
                )
            speeds = add_utilisation(measured, unet_flops(unets[model]), arguments.device)
            result["results"].append({"model": model, "method": method, "matmul_speeds": speeds, "rows": measured})
            # after each, so that an interrupted run leaves what it has
            (arguments.out / "training.json").write_text(json.dumps(result, indent=1))
            (arguments.out / "training.md").write_text(markdown(result))
    print(markdown(result), end="")
