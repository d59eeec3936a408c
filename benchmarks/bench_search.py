"""HRF-D's cheap searches against the published one: what their choices lose, and what they cost.

    hrf bench search                                  # the shipped `fashion` model, JPEG compressibility, T 40
    hrf bench search --model portraits reward.name=classifier reward.kwargs.target=…
    hrf bench search --quick                          # does it run? its figures mean nothing

A start is as good as its score Δ̂ − β·d̂, and that is measured with noise: the published search re-noises its anchor five
times. So no search is judged by its own numbers. Each anchor is measured by several groups of independent noise; every
search chooses from one of them, and the others together (`--reference-group` samples) say what each start is worth:

    regret = greatest score of any start − score of the chosen one, by the reference, in units of the score's range

Averaged over which group chooses, then over anchors, with bootstrap intervals over anchors. The reference is noisy too:
its greatest score is partly luck, the same luck for all rows, so a regret of 0 is out of reach for everybody. What the
luck leaves alone is the difference between rows: `over exact` is paired by anchor. The yardsticks:

- exact: the published search; chosen from one group and judged by others, its regret is the method's own noise.
- uniform: a start drawn uniformly, in expectation.
- one start: for all anchors the start that the exact scores of the *other* anchors like best. Where this beats `exact`,
  what an anchor's own search adds over the average is noise.

`same start` is the share of choices equal to those of the exact search from another group's noise. A bandit is warmed
up for `--warmup` iterations on anchors drawn from the others, then chooses for one; `--repeats` such courses are
averaged. The weights stand still here, which flatters it; that few anchors warm it up, the fewer the more, does the
opposite, as to `one start`. Writes search.json, with every measured reward and distance, and search.md, after each
anchor.

The rule for the default of window.kwargs.search: the cheapest search for which the upper end of `over exact` is under
0.1, or exact.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.search_bench.regret import SEARCHES, Measurements, judge, make
from benchmarks.training_bench.configurations import base_words
from benchmarks.training_bench.memory import describe, machine, markdown_table
from benchmarks.training_bench.models import make_model
from hrf_fast.build import build_config_reward, build_policy
from hrf_fast.config.load import load_config
from hrf_fast.devices import choose_device
from hrf_fast.noise import NoiseKey, noise_generator, noise_key
from hrf_fast.policies.sample import sample
from hrf_fast.training.probe import probe_starts

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
    """The table, and what it was measured on."""
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
    return "\n".join([*lines, "", markdown_table(HEAD, [_cells(row) for row in result["rows"]])])


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
    arguments = build_parser().parse_args(argv)
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
        given = {name: getattr(arguments, name) for name in names} | {"device": device, "schedule": "dynamic"}
        model = make_model(arguments.model, Path(temporary), arguments.seed)
        # a search is about a reward: this one, unless another is asked for
        chosen = ["reward.name=jpeg_compressibility", *arguments.overrides]
        config = load_config([*base_words(model, **given), *chosen])
        policy, reward = build_policy(config), build_config_reward(config, device)
    batch_size, size = config.compute.batch_size, arguments.group_size
    measured = Measurements(arguments, list(range(0, policy.diffusion.stochastic_steps, arguments.stride)))
    ids = torch.arange(arguments.noises * size, device=device)
    anchor_noise = NoiseKey(noise_key(arguments.seed, 0, "anchors"), torch.arange(arguments.anchors, device=device))
    seconds: dict[str, list[float]] = {name: [] for name in SEARCHES}
    result: dict[str, Any] = {
        "machine": machine(device, torch.get_num_threads()),
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("out", "device")},
        "reward": config.reward.name or " + ".join(term.name or "" for term in config.reward.terms),
        "candidates": measured.candidates,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    anchors = sample(policy, anchor_noise, batch_size=batch_size)

    def timed_probe(anchor: Tensor, index: int, noises: Sequence[Tensor], name: str) -> Callable[..., Any]:
        key = noise_key(arguments.seed, 1 + index, "search")

        def probe(candidates: Sequence[Sequence[int]], *, estimate: str = "exact") -> list[tuple[Tensor, Tensor]]:
            started = time.perf_counter()
            places = [NoiseKey(key, own) for own in noises]
            where = [anchor] * len(places)
            found = probe_starts(policy, reward, where, candidates, places, estimate=estimate, batch_size=batch_size)
            seconds[name].append((time.perf_counter() - started) / sum(map(len, noises)))
            return found

        return probe

    with tqdm(total=len(anchors) * (len(SEARCHES)), unit="search") as bar:
        for index, anchor in enumerate(anchors):
            for name in SEARCHES:
                bar.set_postfix_str(f"anchor {index + 1}, {name}", refresh=True)
                if name in measured.tables:
                    probe = timed_probe(anchor, index, list(ids.split(size)), name)
                    found = probe([measured.candidates] * arguments.noises, estimate=name)
                    measured.tables[name].append(torch.stack([torch.stack(means) for means in found]))
                else:
                    # a fresh bandit's pulls, which are of random arms, for its time
                    draw = noise_generator(arguments.seed, index, "windows")
                    make(arguments, name)(0, 1, generator=draw, probe=timed_probe(anchor, index, [ids[:size]], name))
                bar.update()
            if len(measured) > 1:
                # after each, so that an interrupted run leaves what it has
                tables = {name: [table.tolist() for table in tables] for name, tables in measured.tables.items()}
                result |= {"anchors": len(measured), "rows": judge(measured, seconds), "measured": tables}
                (arguments.out / "search.json").write_text(json.dumps(result))
                (arguments.out / "search.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    from hrf_fast.command import run_command

    sys.exit(run_command(main))
