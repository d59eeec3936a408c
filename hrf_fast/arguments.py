"""Arguments: the parsers of the `hrf` command's words, and what parsers of other commands share with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BENCHMARKS = ("kernels", "call", "training", "memory", "search", "signal", "peer", "blend", "gpu")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default in (None, [], False, argparse.SUPPRESS)
        return action.help if none else super()._get_help_string(action)


def complete_option(prefix: str, **_: Any) -> list[str]:
    """`section.option=` and its choices, for a shell that completes a word."""
    from hrf_fast.config.describe import completions

    return completions(prefix)


def path(word: str) -> Path:
    """A path of the command line; a shell leaves ~ alone in --out=~/page.html."""
    return Path(word).expanduser()


def make_parsers(
    functions: Mapping[str, Callable[[argparse.Namespace], Any]],
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of `hrf` and that of each command, whose help is its function's docstring.

    Args:
        functions: of all commands by name; the words of `train` are read by config/load.py.
    """
    parser = argparse.ArgumentParser(
        prog="hrf",
        description="Hierarchical Reward Fine-tuning of diffusion models",
        epilog="Completion of commands and options in bash and zsh: pip install 'hrf_fast[completion]', then put "
        'eval "$(register-python-argcomplete hrf)" into .bashrc or .zshrc.',
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command")

    def add(name: str) -> argparse.ArgumentParser:
        text = functions[name].__doc__
        # `train --help` lists the options of a configuration
        command = commands.add_parser(
            name.replace("_", "-"), help=text, description=text, formatter_class=HelpFormatter, add_help=name != "train"
        )
        command.set_defaults(function=functions[name])
        return command

    def add_options(command: argparse.ArgumentParser, name: str, text: str) -> None:
        # without a default argparse names it among the arguments that are missing
        action = command.add_argument(name, nargs="*", default=[], help=text)
        action.completer = complete_option  # type: ignore[attr-defined]

    command = add("train")
    command.add_argument("--config", action="append")
    add_options(command, "words", "section.option=value")
    command = add("sample")
    models = "fashion or another shipped name, a run folder, one of its checkpoints, a diffusers folder or a hub id"
    command.add_argument("model", help=models)
    command.add_argument("--out", type=path, metavar="FILE", help="picture of a grid to write; samples.png by default")
    folder = "write a PNG for each image and prompts.jsonl into a new folder instead"
    command.add_argument("--folder", type=path, metavar="DIR", help=folder)
    count = "images of all prompts together, at least 1; each prompt has count/prompts of them, rounded down"
    command.add_argument("--count", type=int, default=64, help=count)
    steps = "denoising steps; a run's own, else 40"
    command.add_argument("--steps", type=int, dest="num_inference_steps", metavar="N", help=steps)
    without_noise = "draw by so many deterministic steps (DDIM with eta 0, a flow's ODE), 0 with noise; a run's own"
    command.add_argument("--deterministic-steps", type=int, metavar="N", help=without_noise)
    scheduler = "a run's own, else ddim; a flow-matching model has the last three"
    kinds = ("ddim", "ddpm", "flow_sde", "dance_sde", "cps")
    command.add_argument("--scheduler", choices=kinds, help=scheduler)
    command.add_argument("--eta", type=float, help="a run's own, else 1")
    command.add_argument("--noise-level", type=float, help="of a flow-matching model; a run's own, else as published")
    many: dict[str, Any] = {"action": "append", "default": [], "metavar": "TEXT"}
    command.add_argument("--prompt", **many, dest="prompts", help="of a text-to-image model, may repeat; a run's own")
    file = "prompts from a .txt or .jsonl file, as prompts.source takes them, instead of --prompt"
    command.add_argument("--prompts", dest="prompts_file", metavar="FILE", help=file)
    command.add_argument("--negative", **many, dest="negatives", help="negative prompt, of all prompts or one of each")
    guidance = "factor of guidance; a run's own, else 1 for none"
    command.add_argument("--guidance", type=float, dest="guidance_scale", metavar="SCALE", help=guidance)
    command.add_argument("--variant", help="of the weight files of a folder or hub id, such as fp16")
    command.add_argument("--seed", type=int, default=1234, help="of the noise")
    command.add_argument(
        "--images-per-call",
        type=int,
        help="images in a network call, at least 1 (default: those of a run's panels, or 64; of a text-to-image model "
        "by name as many as are decoded at once)",
    )
    command.add_argument("--device", default="auto", help="auto (cuda if there is one), cpu, cuda or cuda:N")
    command = add("evaluate")
    runs = "the folder of a finished run, or a checkpoint such as RUN/checkpoints/iteration-000010"
    command.add_argument("model", type=path, help=runs)
    written = "JSON file to write; by default RUN/evaluation.json, and RUN/evaluation-000010.json of that checkpoint"
    command.add_argument("--out", type=path, metavar="FILE", help=written)
    command.add_argument("--all", action="store_true", help="print every metric; the JSON file always has them all")
    add_options(command, "overrides", "options to change, such as evaluation.panel_size=512")
    command = add("blend")
    command.add_argument("run", type=path, help="a finished run's folder")
    command.add_argument("--keep", type=float, default=0.95, help="least share of the pretrained Vendi Score")
    command.add_argument("--quality", type=float, default=0.0, help="least share of the pretrained Inception Score")
    command.add_argument("--most", type=float, default=2.0, help="largest alpha; 1 is the tuned model")
    command.add_argument("--step", type=float, default=0.2, help="distance of the alphas")
    add_options(command, "words", "options to change, such as run.device=cpu")
    command = add("export")
    command.add_argument("model", type=path, help=runs)
    command.add_argument("--out", type=path, required=True, help="a new folder")
    merge = "a whole pipeline with the adapters merged into its weights, of a text-to-image model tuned by LoRA"
    command.add_argument("--merge", action="store_true", help=merge)
    command = add("report")
    command.add_argument("runs", nargs="+", type=path, help="run folders; several are compared")
    command.add_argument("--out", type=path, help="HTML file; by default report.html in the first run")
    command.add_argument("--name", **many, dest="names", help="of a run, one for each in order; by default its method")
    strip = "also write a strip of images, a row for each run"
    command.add_argument("--strip", type=path, metavar="FILE.png", help=strip)
    command = add("plan")
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
    add("rewards")
    add("schedules")
    command = add("serve_reward")
    command.add_argument("reward", help="a name of `hrf rewards`, or module:function")
    command.add_argument("words", nargs="*", default=[], help="its arguments, as name=value in YAML")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; whoever reaches it can ask")
    command.add_argument("--port", type=int, default=8000, help="port, 0 for any that is free")
    command.add_argument("--max-bytes", type=int, default=1 << 30, help="largest request, in bytes")
    command.add_argument("--device", default="auto", help="auto (cuda if there is one), cpu, cuda or cuda:N")
    command = add("bench")
    command.add_argument("what", choices=BENCHMARKS, help="benchmark to run")
    command.add_argument("words", nargs=argparse.REMAINDER, help="options; hrf bench training --help lists them")
    command = add("study")
    command.add_argument("what", choices=("run", "report"), help="train, or compare what was trained")
    command.add_argument("words", nargs=argparse.REMAINDER, help="FILE and options; hrf study run --help lists them")
    command = add("from_trl")
    command.add_argument("--out", type=path, help="new YAML file; printed by default")
    command.add_argument("--processes", type=int, help="that TRL was launched on, 1 by default")
    source = (
        "a script with a DDPOConfig, or a JSON file of its fields; --field=value, as given to the script, may follow"
    )
    command.add_argument("source", type=path, help=source)
    add("doctor")
    return parser, commands.choices
