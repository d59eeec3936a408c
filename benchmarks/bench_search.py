"""HRF-D's cheap searches against the published one: what their choices lose, and what they cost.

    hrf bench search                                  # the shipped `fashion` model, JPEG compressibility, T 40
    hrf bench search --model portraits reward.name=classifier reward.kwargs.target=…
    hrf bench search --quick                          # does it run? its figures mean nothing

A start is as good as its criterion Δ̂ − β·d̂, and that is measured with noise: the published search re-noises its anchor
five times. So no search is judged by its own numbers. Each anchor is measured by several groups of independent noise;
every search chooses from one of them, and the others together (`--reference-group` samples) say what a start is worth:

    regret = greatest criterion of any start − criterion of the chosen one, by the reference, in units of its range

The regret is averaged over which group chooses, then over anchors, with bootstrap intervals over anchors. The reference
is noisy too: its greatest criterion is partly luck, equal for all rows, so nobody can reach a regret of 0. The
difference between rows is free of that luck: `over exact` is paired by anchor. The yardsticks:

- exact: the published search; chosen from one group and judged by others, its regret is the method's own noise.
- uniform: a start drawn uniformly, in expectation.
- one start: for all anchors the start that the exact criteria of the *other* anchors like best. Where this beats
  `exact`, an anchor's own search adds nothing but noise to the average.

`same start` is the share of choices equal to those of the exact search from another group's noise. A bandit is warmed
up for `--warmup` iterations on anchors drawn from the others, then chooses for one; `--repeats` such courses are
averaged. The weights stand still here, which flatters a bandit; that few anchors warm it up does the opposite, as it
does to `one start`. Writes search.json, with every measured reward and distance, and search.md, after each anchor.

The rule for the default of window.kwargs.search: the cheapest search for which the upper end of `over exact` is under
0.1, or exact.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.machine import describe, machine
from benchmarks.search_bench.measuring import Prober
from benchmarks.search_bench.regret import SEARCHES, Measurements, judge, make
from benchmarks.tables import markdown_table
from benchmarks.training_bench.configurations import base_words
from benchmarks.training_bench.models import make_model
from hrf_fast.config.load import load_config
from hrf_fast.devices import choose_device
from hrf_fast.run.card import reward_name

HEAD = (
    "search",
    "UNet evaluations per sample",
    "seconds per sample",
    "same start",
    "regret [95 %]",
    "over exact [95 %]",
    "mean start",
    "distinct starts",
)


def markdown(result: dict[str, Any]) -> str:
    """The table below the settings that it was measured with."""
    settings = result["settings"]
    lines = [
        f"### The search of HRF-D, {settings['model']}, {result['reward']}",
        "",
        f"T {settings['steps']}, a candidate every {settings['stride']} steps, groups of {settings['group_size']}, "
        f"{result['anchors']} anchors, judged by {settings['reference_group']} other samples; "
        f"bandits after {settings['warmup']} iterations of {settings['groups']} groups. " + describe(result["machine"]),
    ]
    if settings["quick"]:
        lines.append("\n**A quick run: it shows that everything runs; the figures mean nothing.**")
    return "\n".join([*lines, "", markdown_table(HEAD, map(_cells, result["rows"])), ""])


def _cells(row: dict[str, Any]) -> list[str]:
    (regret, low, high), (over, worst_low, worst_high) = row["regret"], row["over_exact"]
    return [
        row["name"],
        f"{row['evaluations_per_sample']:.1f}",
        "" if row["seconds_per_sample"] is None else f"{row['seconds_per_sample']:.3f}",
        f"{row['same_start']:.0%}",
        f"{regret:.3f} [{low:.3f}, {high:.3f}]",
        "" if row["name"] == "exact" else f"{over:+.3f} [{worst_low:+.3f}, {worst_high:+.3f}]",
        f"{row['mean_start']:.1f}",
        str(len(row["starts"])),
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hrf bench search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a shipped one, tiny, cifar or celebahq (random weights); default fashion")
    parser.add_argument("--anchors", type=int, default=12, help="6,300 UNet evaluations each by default")
    parser.add_argument("--reference-group", type=int, default=10, help="samples that judge, a multiple of a group")
    parser.add_argument("--group-size", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="T")
    parser.add_argument("--stride", type=int, default=2, help="window.kwargs.stride")
    parser.add_argument("--beta", type=float, default=0.5, help="window.kwargs.beta")
    parser.add_argument("--groups", type=int, default=4, help="per iteration of a bandit")
    parser.add_argument("--warmup", type=int, default=20, help="iterations of a bandit before it is judged")
    parser.add_argument("--repeats", type=int, default=5, help="courses of a bandit")
    parser.add_argument("--threads", type=int, help="of torch; default as torch chooses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of search.json and search.md")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("overrides", nargs="*", help="section.field=value, such as reward.name=…")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments with their defaults filled in.

    Raises:
        ValueError: names the argument, its value and the rule.
    """
    arguments = build_parser().parse_intermixed_args(argv)
    if arguments.quick:
        arguments.model, arguments.anchors, arguments.group_size = arguments.model or "tiny", 2, 2
        arguments.reference_group, arguments.steps, arguments.warmup, arguments.repeats = 4, 8, 3, 2
        arguments.threads = 1
    arguments.model = arguments.model or "fashion"
    least = {"anchors": 2, "group_size": 1, "steps": 4, "stride": 1, "groups": 1, "warmup": 0, "repeats": 1}
    for name, minimum in least.items():
        if getattr(arguments, name) < minimum:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is {getattr(arguments, name)}; use at least {minimum}")
    size, reference = arguments.group_size, arguments.reference_group
    if reference < size or reference % size:
        raise ValueError(f"--reference-group is {reference}; use a multiple of --group-size, {size}")
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads is {arguments.threads}; use at least 1")
    arguments.noises = 1 + reference // size
    for name in SEARCHES:
        make(arguments, name)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write search.json and search.md.

    Raises:
        ValueError: an argument or an option that can't work.
    """
    arguments = parse(argv)
    device = choose_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        names = ("steps", "groups", "group_size", "seed")
        settings = {name: getattr(arguments, name) for name in names} | {"device": device, "schedule": "dynamic"}
        model = make_model(arguments.model, Path(temporary), arguments.seed)
        # a search is about a reward: this one, unless another is asked for
        reward = ["reward.name=jpeg_compressibility", *arguments.overrides]
        config = load_config([*base_words(model, **settings), *reward])
        prober = Prober(config, arguments, device)
    measured = Measurements(arguments, prober.candidates)
    result: dict[str, Any] = {
        "machine": machine(device, torch.get_num_threads()),
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("out", "device")},
        "reward": reward_name(config.reward),
        "candidates": measured.candidates,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    anchors = prober.anchors()
    with tqdm(total=len(anchors) * len(SEARCHES), unit="search") as bar:
        for index, anchor in enumerate(anchors):
            for name in SEARCHES:
                bar.set_postfix_str(f"anchor {index + 1}, {name}", refresh=True)
                if name in measured.tables:
                    measured.tables[name].append(prober.measure(index, anchor, name))
                else:
                    prober.time_bandit(index, anchor, name)
                bar.update()
            if len(measured) > 1:
                # after each, so that an interrupted run leaves what it has
                tables = {name: [table.tolist() for table in tables] for name, tables in measured.tables.items()}
                result |= {"anchors": len(measured), "rows": judge(measured, prober.seconds), "measured": tables}
                (arguments.out / "search.json").write_text(json.dumps(result))
                (arguments.out / "search.md").write_text(markdown(result))
    print(markdown(result), end="")
