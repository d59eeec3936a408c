"""Plan: a study expanded into its runs, each with its whole configuration. Nothing is trained here.

Left out: what only the model tells, such as whether a window leaves a step to train; such a run fails when it begins.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hrf_fast.config.load import differences, load_config, to_yaml
from hrf_fast.config.options import FACTS, Config
from hrf_fast.config.run_options import RunConfig
from hrf_fast.evaluation.panel import choose_network
from hrf_fast.registry import load_user_function
from hrf_fast.run.files import sha256
from hrf_fast.user_code import source_of
from hrf_fast.windows.schedules import build_schedule

RATE = "optimizer.learning_rate"


@dataclass(frozen=True)
class BlendOf:
    """An arm that trains nothing: blends of another arm's runs."""

    arm: str
    keep: float
    most: float
    step: float
    """As `hrf blend` takes the three."""


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    case: str
    arm: str
    seed: int
    config: Config
    """Whole but for run.folder."""
    tuning: bool
    """Whether it is there to choose the arm's learning rate only."""
    rate_in_name: bool
    blend: BlendOf | None = None

    @property
    def learning_rate(self) -> float:
        return self.config.optimizer.learning_rate

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.case}-{self.arm}-{self.seed}" + (f"-{self.learning_rate:g}" if self.rate_in_name else "")

    @property
    def training(self) -> Job:
        """The run itself, of a blend the one that it is of."""
        return replace(self, arm=self.blend.arm, blend=None) if self.blend else self

    @property
    def configuration(self) -> str:
        """Hash of the options that are not at their defaults, less those that say where and how a run happens."""
        config = replace(self.config, run=RunConfig(seed=self.seed))
        values = {option: repr(value) for option, (_, value) in differences(Config(), config).items()}
        values |= self._sources()
        if self.blend:
            values["blend"] = repr(self.blend)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def panel_prompts(self) -> tuple[Any, ...]:
        """The options that say which prompts a panel has."""
        prompts, of_panel = self.config.prompts, self.config.evaluation.prompts
        source = (prompts.source, prompts.kwargs) if of_panel is None else (of_panel,)
        return (*source, prompts.negative)

    def _sources(self) -> dict[str, str]:
        """SHA-256 of the user's code and prompt files, by what names them; empty where there are none.

        Raises:
            ValueError: code that can't be loaded.
        """
        config = self.config
        sources: dict[str, str] = {}
        functions: dict[str, list[str | None]] = {
            "reward.name": [config.reward.name],
            "reward.terms": [term.name for term in config.reward.terms],
            "window.schedule": [config.window.schedule],
            "train.advantages": [config.train.advantages],
            "prompts.source": [config.prompts.source],
            "evaluation.prompts": [config.evaluation.prompts],
            "evaluation.rewards": [held.name for held in config.evaluation.rewards],
        }
        for option, names in functions.items():
            for name in filter(None, names):
                if Path(name).expanduser().is_file():
                    sources[f"{option} {name}"] = sha256(Path(name).expanduser())
                elif ":" in name and (source := source_of(load_user_function(name, option))):
                    sources[f"{option} {name}"] = source["sha256"]
        return sources

    def to_yaml(self, folder: Path) -> str:
        """The configuration of the run in `folder`, as a `--config` file."""
        return to_yaml(replace(self.config, run=replace(self.config.run, folder=str(folder))))


@dataclass(frozen=True)
class Study:
    """A study's file, as `study.reading` has checked it."""

    path: Path
    files: tuple[Path, ...]
    """Configurations below all runs, later ones over earlier ones."""
    options: dict[str, Any]
    seeds: tuple[int, ...]
    cases: dict[str, dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    """Options by arm; an arm of blends has those of the arm that it blends."""
    blends: dict[str, BlendOf]
    """By arm."""
    reference: str
    """The arm that the others are compared with."""
    keep: float
    """Floor of diversity, as a share of the pretrained model's Vendi Score."""
    commits: tuple[str, ...] = ()
    """Whose lines count besides those of the code's own: they made its published results."""
    tuning_seeds: tuple[int, ...] = ()
    learning_rates: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def results(self) -> Path:
        """Where its lines are kept by default."""
        return Path("benchmarks") / "results" / f"study-{self.name}.jsonl"

    def shown_rate(self, rate: float) -> str:
        """A learning rate, and whether it is at an end of those tried, so that one beyond might do better."""
        if len(self.learning_rates) == 1:
            return f"{rate:g}"
        ends = {min(self.learning_rates): " (lowest)", max(self.learning_rates): " (highest)"}
        return f"{rate:g}{ends.get(rate, '')}"

    def job(self, case: str, arm: str, seed: int, learning_rate: float | None = None) -> Job:
        """One run; a learning rate is given where the study tunes it.

        Raises:
            ValueError: its configuration can't work.
        """
        layers = {
            f"{self.path}: options": self.options,
            f"{self.path}: cases.{case}": self.cases[case],
            f"{self.path}: arms.{arm}": self.arms[arm],
        }
        words = [word for file in self.files for word in ("--config", str(file))]
        words += [f"run.seed={seed}", "run.progress=quiet"]
        if learning_rate is not None:
            words.append(f"{RATE}={learning_rate!r}")
        try:
            config = load_config(words, layers)
        except ValueError as error:
            raise ValueError(f"case {case}, arm {arm}: {error}") from error
        return Job(case, arm, seed, config, seed in self.tuning_seeds, bool(self.learning_rates), self.blends.get(arm))

    def tuning_jobs(self) -> list[Job]:
        """The runs that choose learning rates; none where the study tunes nothing."""
        return [
            self.job(case, arm, seed, rate)
            for case in self.cases
            for seed in self.tuning_seeds
            for arm in self.arms
            for rate in self.learning_rates
        ]

    def jobs(self, rates: dict[tuple[str, str], float]) -> list[Job]:
        """The runs that are compared, seed after seed.

        Args:
            rates: the chosen learning rate by (case, arm), where the study tunes it; what lacks one is left out.
        """
        return [
            self.job(case, arm, seed, rates.get((case, arm)))
            for case in self.cases
            for seed in self.seeds
            for arm in self.arms
            if not self.learning_rates or (case, arm) in rates
        ]

    def check(self) -> None:
        """Refuse configurations that can't work or can't be compared, before anything is trained.

        Raises:
            ValueError: names case, arm, option, value and the way out.
        """
        for case in self.cases:
            trained = [arm for arm in self.arms if arm not in self.blends]
            jobs = [self.job(case, arm, self.seeds[0], *self.learning_rates[:1]) for arm in trained]
            for job in jobs:
                _check_schedule(job)
            for job in jobs[1:]:
                one, two = jobs[0].panel_prompts, job.panel_prompts
                if one != two:
                    raise ValueError(
                        f"{self.path}: the prompts of panels are {one!r} in arm {jobs[0].arm} and {two!r} in arm "
                        f"{job.arm}, so that they can't be compared; set one evaluation.prompts in options or cases"
                    )
                unequal = differences(jobs[0].config, job.config)
                for option, (one, two) in unequal.items():
                    if FACTS[option].panel:
                        raise ValueError(
                            f"{self.path}: {option} is {one!r} in arm {jobs[0].arm} and {two!r} in arm {job.arm}, so "
                            "their panels can't be compared; set it in options or cases"
                        )
            network, model = jobs[0].config.evaluation.network, jobs[0].config.model.name
            if choose_network(network, model, torch.device("cpu")) is None:
                raise ValueError(
                    f"{self.path}, case {case}: evaluation.network is {network!r}, which has no features for "
                    f"model.name {model!r}, but a study compares Vendi Scores; use a shipped name, a hub id or a folder"
                )


def _check_schedule(job: Job) -> None:
    config = job.config
    steps = config.sample.num_inference_steps
    try:
        build_schedule(config.window.schedule, config.window.kwargs, num_inference_steps=steps, stop=steps)
    except ValueError as error:
        raise ValueError(f"case {job.case}, arm {job.arm}: {error}") from error
