"""Command: `hrf study run FILE` and `hrf study report FILE`; it imports inside functions, so that --help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hrf_fast.arguments import HelpFormatter, path

if TYPE_CHECKING:
    from hrf_fast.study.plan import Study


def run(arguments: argparse.Namespace) -> None:
    """Train what the study lacks; the same command resumes."""
    from hrf_fast.study.reading import read_study
    from hrf_fast.study.results import Results
    from hrf_fast.study.run import run_study

    study = read_study(arguments.file)
    results = Results(arguments.results or study.results)
    out = arguments.out or Path("runs") / f"study-{study.name}"
    run_study(study, out=out, results=results, jobs=arguments.jobs, also=_also(arguments, study))
    print(f"{results.path} (hrf study report {arguments.file})")


def report(arguments: argparse.Namespace) -> None:
    """Compare the arms over seeds: tables and a plot beside the results."""
    from hrf_fast.study.reading import read_study
    from hrf_fast.study.report import write_report
    from hrf_fast.study.results import Results

    study = read_study(arguments.file)
    results = Results(arguments.results or study.results)
    print(write_report(study, results, target=arguments.target, also=_also(arguments, study)))


def _also(arguments: argparse.Namespace, study: Study) -> list[str]:
    return [*study.commits, *arguments.also_commit]


def main(words: Sequence[str]) -> None:
    """Run `run FILE` or `report FILE` with their options."""
    parser = argparse.ArgumentParser(prog="hrf study")
    commands = parser.add_subparsers(required=True, metavar="run | report")
    for function in (run, report):
        command = commands.add_parser(
            function.__name__, help=function.__doc__, description=function.__doc__, formatter_class=HelpFormatter
        )
        command.set_defaults(function=function)
        command.add_argument("file", type=path, help="a study, such as configs/study/fashion_compressibility.yaml")
        results = "file of JSON lines; benchmarks/results/study-NAME.jsonl by default"
        command.add_argument("--results", type=path, metavar="FILE.jsonl", help=results)
        also = "lines of this commit count too, besides those of `commits` in the file; may repeat"
        command.add_argument("--also-commit", action="append", default=[], metavar="COMMIT", help=also)
        if function is run:
            command.add_argument("--jobs", type=int, default=1, help="runs side by side, at least 1")
            command.add_argument("--out", type=path, help="folder of the runs; runs/study-NAME by default")
        else:
            target = "gain that evaluations are counted to; by default the highest that all runs of both arms reach"
            command.add_argument("--target", type=float, metavar="GAIN", help=target)
    arguments = parser.parse_args(words)
    arguments.function(arguments)
