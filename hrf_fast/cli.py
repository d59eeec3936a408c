"""The `hrf` command. Imports inside commands, so that `hrf --help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hrf_fast.command import RESUMES, HelpFormatter, complete_option, path, run_command

BENCHMARKS = ("kernels", "training", "memory", "search", "signal", "peer", "blend", "gpu")
CONFIG_HELP = "--config FILE (may repeat, later ones win) and section.field=value"


def train(arguments: argparse.Namespace) -> None:
    """Fine-tune; the same command resumes."""
    from hrf_fast.config.load import load_config
    from hrf_fast.train import train as run_training

    result = run_training(load_config(arguments.words))
    print(f"done, {result.reason}: {result.folder} (hrf report {result.folder})", file=sys.stderr)


def sample(arguments: argparse.Namespace) -> None:
    """Write a grid of images of a model."""
    from hrf_fast.commands import draw

    draw(**_given(arguments))
    print(f"{arguments.out}: {arguments.count} images of {arguments.model}")


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate a run's tuned model and its pretrained one on a fixed panel."""
    from hrf_fast.commands import evaluate as evaluate_run

    print(f"written to {evaluate_run(arguments.run, arguments.overrides)} (95 % intervals)")


def blend(arguments: argparse.Namespace) -> None:
    """Find the best model on the line from a run's pretrained model through its tuned one and beyond; RUN/blend."""
    from hrf_fast.blending import blend as blend_run

    print("\n".join([*blend_run(**_given(arguments)), f"written to {arguments.run / 'blend'}"]))


def export(arguments: argparse.Namespace) -> None:
    """Write a checkpoint as a diffusers folder."""
    from hrf_fast.commands import export as export_checkpoint

    export_checkpoint(arguments.checkpoint, arguments.out, merge=arguments.merge)
    print(f"written to {arguments.out}")


def report(arguments: argparse.Namespace) -> None:
    """One HTML page from one or more runs."""
    from hrf_fast.report.page import summary_lines, write_report

    print("\n".join(summary_lines(arguments.runs)))
    print(write_report(arguments.runs, arguments.out))
    if arguments.strip:
        from hrf_fast.report.strip import write_strip

        print(write_strip(arguments.runs, arguments.strip))


def rewards(arguments: argparse.Namespace) -> None:
    """List the rewards with their arguments and needs."""
    from hrf_fast.rewards import list_rewards

    for info in list_rewards():
        prompts = ", and a model with prompts" if info.reads_prompts else ""
        print(f"{info.name}\n  {info.description}\n  needs: {info.needs}{prompts}")
        for argument in info.arguments:
            default = "required" if argument.required else f"default {argument.default!r}"
            print(f"    {argument.name} ({argument.type}, {default}): {argument.doc}")
    print("module:function\n  your own: function(images [B, 3, H, W] in [0, 1], prompts, **kwargs) -> B numbers")


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
            f"repository and install it with pip install -e ., or run it there by python"
        )
    sys.path.insert(0, str(root))
    importlib.import_module(f"benchmarks.bench_{arguments.what}").main(arguments.words)


def study(arguments: argparse.Namespace) -> None:
    """Train the arms of a study over seeds, or compare them."""
    from hrf_fast.study.command import main as study_main

    study_main([arguments.what, *arguments.words])


def from_trl(arguments: argparse.Namespace) -> None:
    """Translate a script or a JSON file for TRL's DDPOTrainer into a configuration; the script is not run."""
    from hrf_fast.config.trl import convert

    text = convert(arguments.source, arguments.words, processes=arguments.processes)
    if arguments.out is None:
        print(text, end="")
        return
    arguments.out.write_text(text, encoding="utf-8")
    print(f"{arguments.out}: see its comments, then hrf plan or hrf train --config {arguments.out}")


def doctor(arguments: argparse.Namespace) -> None:
    """Say what works on this machine and what does not, and why."""
    from hrf_fast.doctor import examine

    print(examine())


def plan(arguments: argparse.Namespace) -> None:
    """Say what a configuration needs per GPU, what fits, how many network calls it makes, and how long they take."""
    from hrf_fast.config.amounts import parse_memory
    from hrf_fast.config.load import load_config
    from hrf_fast.memory.planner import plan as make_plan
    from hrf_fast.memory.seconds import NO_RATE, measured, seconds_line, stated
    from hrf_fast.memory.table import describe

    if arguments.measure and arguments.rate is not None:
        raise ValueError(f"--measure and --rate {arguments.rate:g} are two rates; give one of them")
    memory, rate = parse_memory(arguments.memory), None if arguments.rate is None else stated(arguments.rate)
    config = load_config([*(word for file in arguments.config for word in ("--config", file)), *arguments.overrides])
    made = make_plan(config, gpus=arguments.gpus, memory=memory)
    rate = measured(made) if arguments.measure else rate
    print(describe(made), seconds_line(made, rate, arguments.target_evaluations) if rate else NO_RATE, sep="\n\n")


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """A command's own arguments by name, where they are those of the function that does it."""
    return {name: value for name, value in vars(arguments).items() if name not in ("command", "version", "function")}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands but `train`, whose words config/load.py reads."""
    return _parsers()[0]


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of `hrf` and that of each command."""
    parser = argparse.ArgumentParser(
        prog="hrf",
        description="Hierarchical Reward Fine-tuning of diffusion models",
        epilog="Completion of commands and options in bash and zsh: pip install 'hrf_fast[completion]', then put "
        'eval "$(register-python-argcomplete hrf)" into .bashrc or .zshrc.',
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command")

    def add(function: Callable[[argparse.Namespace], Any], **kwargs: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(
            function.__name__.replace("_", "-"),
            help=function.__doc__,
            description=function.__doc__,
            formatter_class=HelpFormatter,
            **kwargs,
        )
        command.set_defaults(function=function)
        return command

    def add_options(command: argparse.ArgumentParser, name: str, text: str) -> None:
        command.add_argument(name, nargs="*", help=text).completer = complete_option  # type: ignore[attr-defined]

    command = add(train, add_help=False)
    command.add_argument("--config", action="append")
    add_options(command, "words", "section.option=value")
    command = add(sample)
    models = "fashion or another shipped name, a run folder, one of its checkpoints, a diffusers folder or a hub id"
    command.add_argument("model", help=models)
    command.add_argument("--out", type=path, default="samples.png", help="picture to write")
    command.add_argument("--count", type=int, default=64, help="images, at least 1")
    steps = "denoising steps; a run's own, else 40"
    command.add_argument("--steps", type=int, dest="num_inference_steps", metavar="N", help=steps)
    scheduler = "a run's own, else ddim; a flow-matching model has the last three"
    kinds = ("ddim", "ddpm", "flow_sde", "dance_sde", "cps")
    command.add_argument("--scheduler", choices=kinds, dest="sampler", help=scheduler)
    command.add_argument("--eta", type=float, help="a run's own, else 1")
    command.add_argument("--noise-level", type=float, help="of a flow-matching model; a run's own, else as published")
    many: dict[str, Any] = {"action": "append", "default": [], "metavar": "TEXT"}
    command.add_argument("--prompt", **many, dest="prompts", help="of a text-to-image model, may repeat; a run's own")
    command.add_argument("--negative", **many, dest="negatives", help="negative prompt, of all prompts or one of each")
    guidance = "factor of guidance; a run's own, else 1 for none"
    command.add_argument("--guidance", type=float, dest="guidance_scale", metavar="SCALE", help=guidance)
    command.add_argument("--variant", help="of the weight files of a folder or hub id, such as fp16")
    command.add_argument("--seed", type=int, default=1234, help="of the noise")
    command.add_argument("--images-per-call", type=int, default=64, help="images in a network call, at least 1")
    command.add_argument("--device", default="auto", help="auto (cuda if there is one), cpu, cuda or cuda:N")
    command = add(evaluate)
    command.add_argument("run", type=path, help="a run folder")
    add_options(command, "overrides", "options to change, such as evaluation.panel_size=512")
    command = add(blend)
    command.add_argument("run", type=path, help="a finished run's folder")
    command.add_argument("--keep", type=float, default=0.95, help="least share of the pretrained Vendi Score")
    command.add_argument("--quality", type=float, default=0.0, help="least share of the pretrained Inception Score")
    command.add_argument("--most", type=float, default=2.0, help="largest alpha; 1 is the tuned model")
    command.add_argument("--step", type=float, default=0.2, help="distance of the alphas")
    add_options(command, "words", "options to change, such as run.device=cpu")
    command = add(export)
    command.add_argument("checkpoint", type=path, help="such as RUN/checkpoints/iteration-000010")
    command.add_argument("--out", type=path, required=True, help="a new folder")
    merge = "a whole pipeline with the adapters merged into its weights, of a text-to-image model tuned by LoRA"
    command.add_argument("--merge", action="store_true", help=merge)
    command = add(report)
    command.add_argument("runs", nargs="+", type=path, help="run folders; several are compared")
    command.add_argument("--out", type=path, help="HTML file; by default report.html in the first run")
    strip = "also write a strip of images, a row for each run"
    command.add_argument("--strip", type=path, metavar="FILE.png", help=strip)
    command = add(plan)
    command.add_argument("--config", action="append", default=[], help="as in hrf train")
    command.add_argument("--gpus", type=int, default=1, help="GPUs, at least 1")
    command.add_argument("--memory", required=True, help="of one GPU, such as 80GB (10^9 bytes each) or 24GiB")
    command.add_argument("--measure", action="store_true", help="time a few network calls on this machine")
    command.add_argument(
        "--rate", type=float, metavar="N", help="evaluations a second of one GPU, instead of measuring"
    )
    target = "evaluations to a target, as hrf study report has them: seconds of these too"
    command.add_argument("--target-evaluations", type=float, metavar="N", help=target)
    add_options(command, "overrides", "section.option=value, anywhere among the words")
    add(rewards)
    command = add(serve_reward)
    command.add_argument("reward", help="a name of `hrf rewards`, or module:function")
    command.add_argument("words", nargs="*", help="its arguments, as name=value in YAML")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; whoever reaches it can ask")
    command.add_argument("--port", type=int, default=8000, help="port, 0 for any that is free")
    command.add_argument("--max-bytes", type=int, default=1 << 30, help="largest request, in bytes")
    command.add_argument("--device", default="auto", help="auto (cuda if there is one), cpu, cuda or cuda:N")
    command = add(bench)
    command.add_argument("what", choices=BENCHMARKS, help="benchmark to run")
    command.add_argument("words", nargs=argparse.REMAINDER, help="options; hrf bench training --help lists them")
    command = add(study)
    command.add_argument("what", choices=("run", "report"), help="train, or compare what was trained")
    command.add_argument("words", nargs=argparse.REMAINDER, help="FILE and options; hrf study run --help lists them")
    command = add(from_trl)
    command.add_argument("--out", type=path, help="YAML file; printed by default")
    command.add_argument("--processes", type=int, default=1, help="that TRL was launched on")
    command.add_argument("source", type=path, help="a script with a DDPOConfig, or a JSON file of its fields")
    command.add_argument("words", nargs=argparse.REMAINDER, help="--field=value, as given to the script")
    add(doctor)
    return parser, commands.choices


def _parse(words: list[str]) -> argparse.Namespace:
    """The arguments of a command line; options and positional words may come in any order."""
    parser, commands = _parsers()
    if "_ARGCOMPLETE" in os.environ:
        # a shell asks what may follow
        import argcomplete

        argcomplete.autocomplete(parser)
    if words[:1] in (["bench"], ["study"], ["from-trl"]) or not words or words[0] not in commands:
        # the words after `bench WHAT`, `study WHAT` and `from-trl SOURCE` are its own
        return parser.parse_args(words)
    arguments = commands[words[0]].parse_intermixed_args(words[1:])
    return argparse.Namespace(command=words[0], version=False, **vars(arguments))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `hrf`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"] and "_ARGCOMPLETE" not in os.environ:
        # options of training are section.field=value and --config, which config.py parses
        if not words[1:] or {"-h", "--help"} & set(words[1:]):
            from hrf_fast.config.describe import describe_options

            print(f"usage: hrf train {CONFIG_HELP}\n{describe_options()}")
            return 0
        return run_command(lambda: train(argparse.Namespace(words=words[1:])), RESUMES)
    arguments = _parse(words)
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
