"""The `hrf` command. Imports inside commands, so that `hrf --help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hrf_fast.arguments import make_parsers
from hrf_fast.command import RESUMES, quiet_when_unread, run_command

CONFIG_HELP = "--config FILE (may repeat, later ones win) and section.field=value"


def train(arguments: argparse.Namespace) -> None:
    """Fine-tune; the same command resumes."""
    from hrf_fast.config.load import load_config
    from hrf_fast.run.progress import outliving_terminal
    from hrf_fast.train import train as run_training

    result = run_training(load_config(arguments.words))
    with outliving_terminal():
        print(f"done, {result.reason}: {result.folder} (hrf report {result.folder})", file=sys.stderr)


def sample(arguments: argparse.Namespace) -> None:
    """Write images of a model, as a grid or as a folder."""
    from hrf_fast.commands.sample import draw

    print(draw(**_given(arguments)))


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate a run's tuned model, or one of its checkpoints, and its pretrained one on a fixed panel."""
    from hrf_fast.commands.evaluate import evaluate as evaluate_run

    options = {"out": arguments.out, "everything": arguments.all}
    print(f"written to {evaluate_run(arguments.model, arguments.overrides, **options)}")


def blend(arguments: argparse.Namespace) -> None:
    """Find the best model on the line from a run's pretrained model through its tuned one and beyond; RUN/blend."""
    from hrf_fast.commands.blend import blend as blend_run

    print("\n".join([*blend_run(**_given(arguments)), f"written to {arguments.run / 'blend'}"]))


def export(arguments: argparse.Namespace) -> None:
    """Write a run's tuned model, or one of its checkpoints, as a diffusers folder."""
    from hrf_fast.commands.export import export as export_model

    export_model(arguments.model, arguments.out, merge=arguments.merge)
    print(f"written to {arguments.out}")


def report(arguments: argparse.Namespace) -> None:
    """One HTML page from one or more runs."""
    from hrf_fast.report.page import summary_lines, write_report

    print("\n".join(summary_lines(arguments.runs, names=arguments.names)))
    print(write_report(arguments.runs, arguments.out, names=arguments.names))
    if arguments.strip:
        from hrf_fast.report.strip import write_strip

        print(write_strip(arguments.runs, arguments.strip, names=arguments.names))


def rewards(arguments: argparse.Namespace) -> None:
    """List the rewards with their arguments and needs."""
    from hrf_fast.rewards import list_rewards

    for info in list_rewards():
        prompts = ", and a model with prompts" if info.reads_prompts else ""
        print(f"{info.name}\n  {info.description}\n  needs: {info.needs}{prompts}")
        for argument in info.arguments:
            print(f"    {argument}")
    print("module:function\n  your own: function(images [B, 3, H, W] in [0, 1], prompts, **kwargs) -> B numbers")


def schedules(arguments: argparse.Namespace) -> None:
    """List the window schedules with their options, which are window.kwargs."""
    from hrf_fast.windows.schedules import list_schedules

    for name, description, options in list_schedules():
        print(f"{name}\n  {description}")
        for option in options:
            print(f"    {option}")
    print("module:function\n  your own: see docs/windows.md")


def serve_reward(arguments: argparse.Namespace) -> None:
    """Serve a reward over HTTP, for runs with reward.name=remote."""
    from hrf_fast.rewards.serve import serve

    serve(**_given(arguments))


def bench(arguments: argparse.Namespace) -> None:
    """Measure: kernels, training against the loop as published, memory, what cheap searches lose; check a GPU."""
    root = Path(__file__).parents[1]
    # the benchmarks are part of the repository and not of the package
    if not (root / "benchmarks" / f"bench_{arguments.what}.py").is_file():
        raise ValueError(
            f"there is no benchmarks folder beside {root / 'hrf_fast'} with a bench_{arguments.what}.py; clone the "
            "repository and install it with pip install -e ."
        )
    sys.path.insert(0, str(root))
    importlib.import_module(f"benchmarks.bench_{arguments.what}").main(arguments.words)


def study(arguments: argparse.Namespace) -> None:
    """Train the arms of a study over seeds, or compare them."""
    from hrf_fast.study.command import main as study_main

    study_main([arguments.what, *arguments.words])


def from_trl(arguments: argparse.Namespace) -> None:
    """Translate a script or a JSON file for TRL's DDPOTrainer into a configuration; the script is not run."""
    from hrf_fast.from_trl.convert import convert
    from hrf_fast.run.files import write_atomically

    text, notes = convert(arguments.source, arguments.words, processes=arguments.processes)
    if arguments.out is None:
        print(text, end="")
        return
    if arguments.out.exists():
        raise ValueError(f"--out is {arguments.out}, which is there already; name a new file")
    write_atomically(arguments.out, text.encode())
    for note in notes:
        print(f"- {note}", file=sys.stderr)
    print(f"written to {arguments.out}; mind the notes, which it holds too, then hrf train --config {arguments.out}")


def doctor(arguments: argparse.Namespace) -> None:
    """Say what works on this machine and what does not, and why."""
    from hrf_fast.doctor import examine

    print(examine())


def plan(arguments: argparse.Namespace) -> None:
    """Say what a configuration needs per GPU, what fits, how many network calls it makes, and how long they take."""
    from hrf_fast.config.amounts import parse_memory
    from hrf_fast.config.load import load_config
    from hrf_fast.memory.planner import plan as make_plan
    from hrf_fast.memory.table import plan_page
    from hrf_fast.timing.rates import NO_RATE, measured, seconds_line, stated

    if arguments.measure and arguments.rate is not None:
        raise ValueError(f"--measure and --rate {arguments.rate:g} are two rates; give one of them")
    target = arguments.target_evaluations
    if target is not None and not 0 < target < math.inf:
        raise ValueError(f"--target-evaluations is {target:g}; use a finite number above 0")
    if target is not None and not arguments.measure and arguments.rate is None:
        raise ValueError(
            f"--target-evaluations {target:g} asks for seconds, which need a rate; add --measure or --rate"
        )
    memory, rate = parse_memory(arguments.memory), None if arguments.rate is None else stated(arguments.rate)
    config = load_config([*(word for file in arguments.config for word in ("--config", file)), *arguments.overrides])
    made = make_plan(config, gpus=arguments.gpus, memory=memory)
    rate = measured(made) if arguments.measure else rate
    print(plan_page(made), seconds_line(made, rate, target) if rate else NO_RATE, sep="\n\n")


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """A command's own arguments by name, where they are those of the function that does it."""
    return {name: value for name, value in vars(arguments).items() if name not in ("command", "version", "function")}


COMMANDS = {
    function.__name__: function
    for function in (
        train,
        sample,
        evaluate,
        blend,
        export,
        report,
        plan,
        rewards,
        schedules,
        serve_reward,
        bench,
        study,
        from_trl,
        doctor,
    )
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the words of `train` are config/load.py's, and go there before it."""
    return make_parsers(COMMANDS)[0]


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments of a command line; options and positional words may come in any order."""
    parser, commands = make_parsers(COMMANDS)
    if "_ARGCOMPLETE" in os.environ:
        # a shell asks what may follow
        import argcomplete

        argcomplete.autocomplete(parser)
    if words[:1] in (["bench"], ["study"]) or not words or words[0] not in commands:
        # the words after `bench WHAT` and `study WHAT` are its own
        return parser.parse_args(words)
    if words[0] == "from-trl":
        # words that are no options of ours are fields of TRL's
        arguments, fields = commands[words[0]].parse_known_args(words[1:])
        arguments.words = fields
    else:
        arguments = commands[words[0]].parse_intermixed_args(words[1:])
    return argparse.Namespace(command=words[0], version=False, **vars(arguments))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `hrf`; returns the exit code."""
    return quiet_when_unread(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(words: list[str]) -> int:
    if words[:1] == ["train"] and "_ARGCOMPLETE" not in os.environ:
        # options of training are section.field=value and --config, which config/load.py parses
        if not words[1:] or {"-h", "--help"} & set(words[1:]):
            from hrf_fast.config.describe import describe_options

            print(f"usage: hrf train {CONFIG_HELP}\n{describe_options()}")
            return 0
        return run_command(lambda: train(argparse.Namespace(words=words[1:])), RESUMES)
    arguments = parse(words)
    if arguments.version:
        from hrf_fast.version import __version__

        print(f"hrf_fast {__version__}")
        return 0
    if arguments.command is None:
        build_parser().print_help()
        return 2
    return run_command(lambda: arguments.function(arguments), RESUMES if arguments.command == "study" else "")


if __name__ == "__main__":
    sys.exit(main())
