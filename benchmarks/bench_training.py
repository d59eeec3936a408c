"""Training speed: the published loop against hrf_fast, on the same UNet, noise and machine.

    hrf bench training                                   # the shipped model and a 35 M UNet; with a GPU also 113.7 M
    hrf bench training --models fashion --methods hrf --rounds 9
    hrf bench training --quick                           # does it run? its figures mean nothing

For every model and method each configuration trains in a process of its own, and they take turns. First the rows that
promise the literal loop's numbers are held to them: on other weights nothing is timed. Then JSON and Markdown are
written: medians over turns of trained images per second and of their ratio to the literal loop's in the same turn, UNet
calls counted by a forward hook, peak memory, the overhead, an iteration's time over that of its bare UNet calls, and
the model FLOPs utilisation, the time of those calls' operations in a large matrix product over the iteration's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.training_bench.ceiling import matmul_speed, unet_flops
from benchmarks.training_bench.configurations import LITERAL, METHODS, Row, base_words, rows
from benchmarks.training_bench.memory import describe, machine, markdown_table, note
from benchmarks.training_bench.models import MODELS, make_model, without_clipping
from benchmarks.training_bench.turns import CHECKED, measure
from hrf_fast.devices import choose_device
from hrf_fast.registry import nearest

# what a row costs at most on a CPU is minutes an iteration: these are left to whoever asks for them
_ON_CPU = {"fashion": tuple(METHODS), "portraits": tuple(METHODS), "tiny": tuple(METHODS), "cifar": ("hrf",)}

# a turn of HRF has one iteration of each cluster
PER_ROUND = {"ddpo": 1, "hrf": 2, "hrf_d": 1}
HEAD = (
    "configuration",
    "trained images/s",
    "over literal",
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


def method_words(model: str, method: str, arguments: argparse.Namespace) -> list[str]:
    """The configuration that all rows of a model and method share."""
    names = ("steps", "groups", "group_size", "device", "seed")
    given = base_words(model, schedule=METHODS[method], **{name: getattr(arguments, name) for name in names})
    if method == "hrf":
        half, steps = arguments.steps // 2, arguments.steps
        # one iteration of each cluster in turn
        given += [
            f"window.kwargs.clusters=[[0,{half}],[{half},{steps}]]",
            "window.kwargs.iterations_per_cluster=1",
        ]
    return given


def table_of(method: str, base: list[str], arguments: argparse.Namespace) -> list[tuple[Row, list[str]]]:
    """The literal loop and the chosen rows of a method.

    Raises:
        ValueError: --rows chooses none; says what there is.
    """
    known = rows(method, groups=arguments.groups, group_size=arguments.group_size)
    chosen = [row for row in known if any(fnmatch(row.name, pattern) for pattern in arguments.rows)]
    if not chosen:
        names = "; ".join(row.name for row in known)
        raise ValueError(f"--rows {' '.join(map(repr, arguments.rows))} names none of {method}'s: {names}")
    return [(LITERAL, base), *((row, [*base, *row.words]) for row in chosen)]


def markdown(result: dict[str, Any]) -> str:
    """One table per model and method."""
    settings = result["settings"]
    size = f"{settings['groups']} groups of {settings['group_size']}"
    lines = [
        "### Training against the literal loop",
        "",
        f"T {settings['steps']}, {size} an iteration, medians of {settings['rounds']} turns. "
        + describe(result["machine"]),
    ]
    if settings["quick"]:
        lines.append("\n**A quick run: it shows that everything runs; the figures mean nothing.**")
    for part in result["results"]:
        lines += ["", f"**{part['model']}, {part['method']}**", "", markdown_table(HEAD, map(_cells, part["rows"]))]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    per = row["images_per_turn"]
    low, high = min(row["seconds"]), max(row["seconds"])
    return [
        row["name"],
        f"{row['images_per_second']:.2f}",
        f"{row['speedup']:.2f}×",
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


def add_utilisation(rows: Sequence[dict[str, Any]], unet: Path, device: torch.device) -> dict[str, float]:
    """Give every row its model FLOPs utilisation.

    Returns:
        Operations a second of a large matrix product, by precision.
    """
    without, with_gradient = unet_flops(unet)
    speeds: dict[str, float] = {}
    for row in rows:
        precision = row["options"].get("compute.precision", "fp32")
        if precision not in speeds:
            speeds[precision] = matmul_speed(device, precision)
        row["mfu"] = statistics.median(
            ((images - learnt) * without + learnt * with_gradient) / seconds / speeds[precision]
            for images, learnt, seconds in row.pop("turns")
        )
    return speeds


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hrf bench training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", help=f"of {', '.join(MODELS)}; default fashion, cifar, on CUDA celebahq")
    parser.add_argument("--methods", nargs="+", help=f"of {', '.join(METHODS)}; default all that take minutes at most")
    parser.add_argument("--rows", nargs="+", default=["*"], help="only configurations of these names; * is any text")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each row")
    parser.add_argument("--groups", type=int, default=4, help="per iteration")
    parser.add_argument("--group-size", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="T")
    parser.add_argument("--threads", type=int, help="of torch; default as torch chooses")
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
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads is {arguments.threads}; use at least 1")
    arguments.device = choose_device(arguments.device)
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
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("out", "device")},
        "results": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=0, unit="iteration") as bar:

        def advance(iterations: int, doing: str) -> None:
            if doing:
                bar.set_postfix_str(doing, refresh=False)
            bar.update(iterations)

        tables, unets = {}, {}
        for model, method in plan(arguments):
            spec = without_clipping(make_model(model, Path(temporary), arguments.seed), Path(temporary))
            tables[model, method] = table_of(method, method_words(spec, method, arguments), arguments)
            unets[model] = Path(spec) / "unet"
            bar.total += len(tables[model, method]) * (CHECKED + arguments.rounds * PER_ROUND[method])
        for (model, method), table in tables.items():
            measured = measure(
                table,
                where=f"{model}, {method}",
                folder=Path(temporary) / f"{model}-{method}",
                threads=threads,
                rounds=arguments.rounds,
                per_round=PER_ROUND[method],
                images=arguments.groups * arguments.group_size,
                advance=advance,
            )
            speeds = add_utilisation(measured, unets[model], arguments.device)
            result["results"].append({"model": model, "method": method, "matmul_speeds": speeds, "rows": measured})
            # after each, so that an interrupted run leaves what it has
            (arguments.out / "training.json").write_text(json.dumps(result, indent=1))
            (arguments.out / "training.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    from hrf_fast.command import run_command

    sys.exit(run_command(main))
