"""The `hrf` command. Imports inside commands, so that `hrf --help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hrf_fast.command import RESUMES, run_command

CONFIG_HELP = "--config FILE (may repeat, later ones win) and section.field=value"


def train(arguments: argparse.Namespace) -> None:
    """Fine-tune; the same command resumes."""
    from hrf_fast.config.load import load_config
    from hrf_fast.train import train as run_training

    folder = run_training(load_config(arguments.words))
    print(f"done: {folder} (hrf report {folder})", file=sys.stderr)


def sample(arguments: argparse.Namespace) -> None:
    """Write a grid of images of a model."""
    from hrf_fast.devices import choose_device, set_precision_flags
    from hrf_fast.evaluation.grids import save_grid
    from hrf_fast.evaluation.panel import panel_noise
    from hrf_fast.policies.load import load_policy
    from hrf_fast.policies.sample import sample as denoise

    if arguments.count < 1 or arguments.batch_size < 1:
        raise ValueError(
            f"--count is {arguments.count} and --batch-size {arguments.batch_size}; both must be at least 1"
        )
    name, settings = _model_and_sampler(arguments.model)
    given = {"sampler": arguments.scheduler, "num_inference_steps": arguments.steps, "eta": arguments.eta}
    settings |= {key: value for key, value in given.items() if value is not None}
    device = choose_device(arguments.device)
    # the same seed draws the same grid
    set_precision_flags(device, tf32=False, cudnn_benchmark=False)
    policy = load_policy(name, **settings, device=device)
    noise = panel_noise(policy, arguments.seed, arguments.count)
    latents = denoise(policy, noise, batch_size=arguments.batch_size)
    save_grid(policy.images(latents).cpu(), Path(arguments.out))
    print(f"{arguments.out}: {arguments.count} images of {arguments.model}")


def _model_and_sampler(name: str) -> tuple[str, dict[str, Any]]:
    """A run folder stands for the model that it tuned, sampled as it was trained."""
    if not (Path(name) / "config.yaml").is_file():
        return name, {}
    from hrf_fast.config.load import load_config

    run = _finished_run(name)
    sampler = load_config(["--config", str(run / "config.yaml")]).sample
    steps = sampler.num_inference_steps
    return str(run / "model"), {"sampler": sampler.scheduler, "num_inference_steps": steps, "eta": sampler.eta}


def _finished_run(name: str) -> Path:
    run = Path(name)
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is not a run folder: it has no config.yaml; give one that `hrf train` wrote")
    if not (run / "model").is_dir():
        raise ValueError(f"{run} has no model/ yet; let its training finish (the same `hrf train` command resumes it)")
    return run


def evaluate(arguments: argparse.Namespace) -> None:
    """Score a run's tuned model against its pretrained one on a fixed panel."""
    from dataclasses import asdict

    from hrf_fast.build import build_config_reward, build_policy
    from hrf_fast.config.load import load_config
    from hrf_fast.devices import choose_device
    from hrf_fast.evaluation.panel import choose_network
    from hrf_fast.evaluation.panel import evaluate as score_panel
    from hrf_fast.run.files import write_atomically

    run = _finished_run(arguments.run)
    config = load_config(["--config", str(run / "config.yaml"), *arguments.overrides])
    device = choose_device(config.run.device)
    reward = build_config_reward(config, device)
    scorer = choose_network(config.evaluation.scorer, config.model.name, device)
    result: dict[str, Any] = {"sample": asdict(config.sample), "reward": asdict(config.reward)}
    result["evaluation"] = asdict(config.evaluation)
    for title, name in (("pretrained", None), ("tuned", str(run / "model"))):
        scores = score_panel(
            build_policy(config, name),
            reward,
            scorer,
            panel_size=config.evaluation.panel_size,
            seed=config.evaluation.seed,
            batch_size=config.sample.batch_size,
            resamples=config.evaluation.resamples,
        )
        result[title] = scores.record()
        shown = {k: v for k, v in result[title].items() if k != "rewards"}
        print(
            f"{title:>10}: " + "   ".join(f"{k} {v:.4g} [{low:.4g}, {high:.4g}]" for k, (v, low, high) in shown.items())
        )
    write_atomically(run / "evaluation.json", json.dumps(result, indent=1).encode())
    print(f"written to {run / 'evaluation.json'} (95 % bootstrap intervals)")


def report(arguments: argparse.Namespace) -> None:
    """One HTML page from one or more runs."""
    from hrf_fast.report.page import summary_lines, write_report

    runs = [Path(folder) for folder in arguments.runs]
    print("\n".join(summary_lines(runs)))
    print(write_report(runs, Path(arguments.out) if arguments.out else None))


def rewards(arguments: argparse.Namespace) -> None:
    """List the rewards with their arguments and needs."""
    from hrf_fast.rewards import list_rewards

    for info in list_rewards():
        print(f"{info.name}\n  {info.description}\n  needs: {info.needs}")
        for argument in info.arguments:
            default = "required" if argument.required else f"default {argument.default!r}"
            print(f"    {argument.name} ({argument.type}, {default}): {argument.doc}")
    print("module:function\n  your own: function(images [B, 3, H, W] in [0, 1], prompts, **kwargs) -> B numbers")


def bench(arguments: argparse.Namespace) -> None:
    """Measure: kernels, training against the loop as published, memory, or what HRF-D's cheap searches lose."""
    root = Path(__file__).parents[1]
    # the benchmarks are part of the repository and not of the package
    if not (root / "benchmarks" / f"bench_{arguments.what}.py").is_file():
        raise ValueError(
            f"there is no benchmarks folder beside {root / 'hrf_fast'} with a bench_{arguments.what}.py; clone the "
            f"repository and install it with pip install -e ., or run it there by python"
        )
    sys.path.insert(0, str(root))
    importlib.import_module(f"benchmarks.bench_{arguments.what}").main(arguments.words)


def doctor(arguments: argparse.Namespace) -> None:
    """Say what works on this machine and what does not, and why."""
    from hrf_fast.doctor import examine

    print(examine())


def plan(arguments: argparse.Namespace) -> None:
    """Say what a configuration needs per GPU, what fits, and how many UNet calls it makes."""
    from hrf_fast.config.amounts import parse_memory
    from hrf_fast.config.load import load_config
    from hrf_fast.memory.planner import plan as make_plan
    from hrf_fast.memory.table import describe

    memory = parse_memory(arguments.memory)
    config = load_config([*(word for file in arguments.config for word in ("--config", file)), *arguments.overrides])
    print(describe(make_plan(config, gpus=arguments.gpus, memory=memory)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hrf", description="Hierarchical Reward Fine-tuning of diffusion models")
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command")

    def add(function: Callable[[argparse.Namespace], Any], **kwargs: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__, **kwargs)
        command.set_defaults(function=function)
        return command

    add(train, add_help=False)
    command = add(sample)
    command.add_argument("model", help="fashion, portraits, a run folder, a diffusers folder or a hub id")
    command.add_argument("--out", default="samples.png")
    command.add_argument("--count", type=int, default=64)
    command.add_argument("--steps", type=int, help="denoising steps; a run's own, else 40")
    command.add_argument("--scheduler", choices=("ddim", "ddpm"), help="a run's own, else ddim")
    command.add_argument("--eta", type=float, help="a run's own, else 1")
    command.add_argument("--seed", type=int, default=1234)
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--device", default="auto")
    command = add(evaluate)
    command.add_argument("run", help="a run folder")
    command.add_argument("overrides", nargs="*", help="such as evaluation.panel_size=512")
    command = add(report)
    command.add_argument("runs", nargs="+", help="run folders; several are compared")
    command.add_argument("--out", help="HTML file; by default report.html in the first run")
    command = add(plan)
    command.add_argument("--config", action="append", default=[], help="as in hrf train")
    command.add_argument("--gpus", type=int, default=1)
    command.add_argument("--memory", required=True, help="of one GPU, such as 80GB (10^9 bytes each) or 24GiB")
    command.add_argument("overrides", nargs="*", help="section.field=value")
    add(rewards)
    command = add(bench)
    command.add_argument("what", choices=("kernels", "training", "memory", "search"))
    command.add_argument("words", nargs=argparse.REMAINDER, help="options; hrf bench training --help lists them")
    add(doctor)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `hrf`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        # options of training are section.field=value and --config, which config.py parses
        if not words[1:] or {"-h", "--help"} & set(words[1:]):
            from hrf_fast.config.load import describe_options

            print(f"usage: hrf train {CONFIG_HELP}\n{describe_options()}")
            return 0
        return run_command(lambda: train(argparse.Namespace(words=words[1:])), RESUMES)
    parser = build_parser()
    arguments = parser.parse_args(words)
    if arguments.version:
        from hrf_fast.version import __version__

        print(f"hrf_fast {__version__}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 2
    return run_command(lambda: arguments.function(arguments))


if __name__ == "__main__":
    sys.exit(main())
