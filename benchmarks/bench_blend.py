"""Blends of several runs over seeds: what the way from pretrained weights through tuned ones gives each method.

    hrf blend runs/study-fashion_flow/fashion_flow-ddpo-1        # first, for every run
    hrf bench blend runs/study-fashion_flow/fashion_flow-{ddpo,hrf}-?

Reads RUN/blend; nothing is sampled. Runs whose folders differ in the number at the end alone are the seeds of one
method (a learning rate behind it, as folders of a study have, is left out), and the others are compared with the first
method, paired by that number. Three tables: means over seeds along
α, on the panel that each α was chosen on; the chosen α and the tuned model on each run's second panel; and the methods
along the line, as `hrf study report` compares them along training. All runs must have been blended with one --keep,
--quality and --most, and lines are cut to the α that all share. Writes blend.json, blend.md and blend.png.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown_table, with_interval
from hrf_fast.evaluation.blend import check_shares, read_front, summary
from hrf_fast.report.plots import Series, paths
from hrf_fast.study.comparison import measures
from hrf_fast.study.report import comparisons
from hrf_fast.study.statistics import estimate

# a learning rate has a point or an exponent
_NAME = re.compile(r"(.*?)[-_]?(\d+)(?:-(?:\d+(?:\.\d+)?e-\d+|\d*\.\d+))?")
Blends = dict[str, dict[int, dict[str, Any]]]
"""By method and seed: `front`, summaries by α on the first panel, and `result`, what blend.json holds."""


def read_blends(runs: Sequence[Path]) -> Blends:
    """The blends of run folders, by method and seed; every front is cut to the α that all of them share.

    Raises:
        ValueError: a run without a whole blend, blends of several settings, floors or lengths, a folder without a
            number at its end, or two of one method and seed.
    """
    blends: Blends = {}
    settings: dict[str, Any] = {}
    choice: dict[str, Any] = {}
    for run in runs:
        name = _NAME.fullmatch(run.resolve().name)
        if name is None:
            raise ValueError(f"{run} has no number at its end, which says the seed; rename it, such as {run.name}-1")
        if int(name[2]) in blends.get(name[1], {}):
            raise ValueError(f"{run} is a second run of method {name[1]} and seed {name[2]}; rename its folder")
        result, belongs = (run / "blend" / file for file in ("blend.json", "settings.json"))
        if not result.exists():
            raise ValueError(f"{run} has no whole blend, {result}; make it with `hrf blend {run}`")
        here = json.loads(belongs.read_text())
        # how often a training made panels says nothing about those of a blend, and "option" is a digest of that too
        here = {key: value for key, value in here.items() if key not in ("weights", "option")}
        here.get("evaluation", {}).pop("every", None)
        differing = [key for key in {**settings, **here} if settings and here.get(key) != settings.get(key)]
        if differing:
            raise ValueError(f"{run} is a blend of another {differing[0]} than {runs[0]}; compare blends of one kind")
        settings = here
        chosen = json.loads(result.read_text())
        asked = {f"--{name}": chosen.get(name) for name in ("keep", "quality", "most")}
        choice = choice or asked
        if asked != choice:
            this, first = (
                ", ".join(f"{option} {value}" for option, value in one.items() if value != other[option])
                for one, other in ((asked, choice), (choice, asked))
            )
            raise ValueError(
                f"{run} was blended with {this} and {runs[0]} with {first}; blend again with equal --keep, --quality "
                "and --most"
            )
        records = read_front(run / "blend" / "front.jsonl")
        panel = [record for record in records if record["seed"] == records[0]["seed"]]
        base = next(record for record in panel if record["alpha"] == 0)
        front = {record["alpha"]: summary(record, base) for record in sorted(panel, key=lambda one: one["alpha"])}
        blends.setdefault(name[1], {})[int(name[2])] = {"front": front, "result": chosen}
    every = [blend for by_seed in blends.values() for blend in by_seed.values()]
    alphas = set.intersection(*(set(blend["front"]) for blend in every))
    for blend in every:
        blend["front"] = {alpha: point for alpha, point in blend["front"].items() if alpha in alphas}
    return blends


def along(blends: Blends) -> str:
    """Mean gain and shares by α over the seeds of each method."""
    rows = []
    for method, by_seed in blends.items():
        for alpha in next(iter(by_seed.values()))["front"]:
            points = [blend["front"][alpha] for blend in by_seed.values()]
            rows.append([method, f"{alpha:g}", *_cells(points)])
    return markdown_table(["method", "alpha", "gain", "Vendi Score kept", "Inception Score kept"], rows)


def chosen(blends: Blends) -> str:
    """The tuned model and the chosen α of each method on the second panel."""
    rows = []
    for method, by_seed in blends.items():
        results = [blend["result"] for blend in by_seed.values()]
        alphas = [result["alpha"] for result in results]
        for name, wanted in (("tuned", [1.0] * len(results)), ("chosen", alphas)):
            points = [
                next(panel for panel in result["panels"] if panel["alpha"] == alpha)
                for result, alpha in zip(results, wanted, strict=True)
            ]
            shown = f"{name}, alpha {', '.join(f'{alpha:g}' for alpha in dict.fromkeys(sorted(wanted)))}"
            rows.append([method, shown, len(points), *_cells(points)])
    return markdown_table(["method", "model", "seeds", "gain", "Vendi Score kept", "Inception Score kept"], rows)


def compared(blends: Blends, keep: float) -> str:
    """The methods along the line from the pretrained model against the first, paired over seeds."""
    arms = {
        method: {seed: {"arm": method, "panels": _panels(blend["front"])} for seed, blend in by_seed.items()}
        for method, by_seed in blends.items()
    }
    # evaluations and seconds mean nothing here
    wanted = [measure for measure in measures(keep, None) if measure.kind in ("gain", "share", "area")]
    header, *rows = comparisons(arms, next(iter(arms)), wanted).rows
    return markdown_table(header, rows)


def picture(blends: Blends, keep: float) -> bytes:
    """Gain against the share kept along α: a thin line a run, a thick one for the mean of a method."""
    arms = []
    for method, by_seed in blends.items():
        lines = [list(blend["front"].values()) for blend in by_seed.values()]
        runs = [Series(method, [p["gain"][0] for p in line], [p["share"] for p in line]) for line in lines]
        columns = list(zip(*lines, strict=True))
        gains, shares = ([estimate([get(p) for p in column]).mean for column in columns] for get in (_gain, _share))
        arms.append((method, runs, Series(method, gains, shares)))
    return paths([("blends", arms)], x_label="gain in reward", y_label="Vendi Score kept", level=keep)


def _gain(point: Mapping[str, Any]) -> float:
    return float(point["gain"][0])


def _share(point: Mapping[str, Any]) -> float:
    return float(point["share"])


def _cells(points: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Mean gain, share of the Vendi Score and of the Inception Score, with their intervals over seeds."""

    def percent(shares: Sequence[float]) -> str:
        return f"{with_interval(estimate([100 * share for share in shares]), '.1f')} %"

    inception = [point["inception_share"] for point in points if "inception_share" in point]
    return [
        with_interval(estimate([_gain(point) for point in points]), "+.3f"),
        percent([_share(point) for point in points]),
        percent(inception) if len(inception) == len(points) else None,
    ]


def _panels(front: Mapping[float, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"evaluations": alpha, "reward": point["reward"], "vendi": point["vendi"]} for alpha, point in front.items()
    ]


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: a floor that is no share.
    """
    parser = argparse.ArgumentParser(
        prog="hrf bench blend", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with a blend each, NAME-SEED")
    parser.add_argument("--keep", type=float, default=0.95, help="share of the Vendi Score that gains are compared at")
    parser.add_argument("--out", type=Path, default=Path("runs/blends"), help="folder of the tables and the picture")
    arguments = parser.parse_args(words)
    check_shares(arguments.keep, quality=0.0)
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Write and print the tables.

    Raises:
        ValueError: what `parse` or `read_blends` refuses.
    """
    arguments = parse(words)
    blends = read_blends(arguments.runs)
    page = "\n\n".join((along(blends), chosen(blends), compared(blends, arguments.keep)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "blend.json").write_text(json.dumps(blends, indent=1) + "\n")
    (arguments.out / "blend.md").write_text(f"{page}\n\n![Gain against the share kept](blend.png)\n")
    (arguments.out / "blend.png").write_bytes(picture(blends, arguments.keep))
    print(page)
