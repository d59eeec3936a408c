"""Plan: a study's file read and expanded into runs, each with its whole configuration. Nothing is trained here.

Left out: what only the model tells, such as whether a window leaves a step to train; such a run fails when it begins.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from hrf_fast.config.load import differences, load_config, to_yaml
from hrf_fast.config.options import FACTS, Config
from hrf_fast.config.run_options import LARGEST_SEED, RunConfig
from hrf_fast.evaluation.panel import choose_network
from hrf_fast.registry import nearest
from hrf_fast.windows.schedules import build_schedule

_KEYS = ("config", "options", "seeds", "cases", "arms", "reference", "keep", "tune")
_REQUIRED = ("config", "seeds", "arms", "reference")
# what a study sets for every run
_OURS = ("run.seed", "run.folder", "run.progress")
RATE = "optimizer.learning_rate"


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

    @property
    def learning_rate(self) -> float:
        return self.config.optimizer.learning_rate

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.case}-{self.arm}-{self.seed}" + (f"-{self.learning_rate:g}" if self.rate_in_name else "")

    @property
    def configuration(self) -> str:
        """Hash of the options that are not at their defaults, less those that say where and how a run happens."""
        config = replace(self.config, run=RunConfig(seed=self.seed))
        values = {option: repr(value) for option, (_, value) in differences(Config(), config).items()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def to_yaml(self, folder: Path) -> str:
        """The configuration of the run in `folder`, as a `--config` file."""
        return to_yaml(replace(self.config, run=replace(self.config.run, folder=str(folder))))


@dataclass(frozen=True)
class Study:
    """A study's file, checked."""

    path: Path
    files: tuple[Path, ...]
    """Configurations below all runs, later ones over earlier ones."""
    options: dict[str, Any]
    seeds: tuple[int, ...]
    cases: dict[str, dict[str, Any]]
    arms: dict[str, dict[str, Any]]
    reference: str
    """The arm that the others are compared with."""
    keep: float
    """Floor of diversity, as a share of the pretrained model's Vendi Score."""
    tuning_seeds: tuple[int, ...] = ()
    learning_rates: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def results(self) -> Path:
        """Where its lines are kept by default."""
        return Path("benchmarks") / "results" / f"study-{self.name}.jsonl"

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
        return Job(case, arm, seed, config, seed in self.tuning_seeds, bool(self.learning_rates))

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
            jobs = [self.job(case, arm, self.seeds[0], *self.learning_rates[:1]) for arm in self.arms]
            for job in jobs:
                _check_schedule(job)
            for job in jobs[1:]:
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


def read_study(path: Path) -> Study:
    """Read a study's file.

    Raises:
        ValueError: no such file, no YAML, an unknown or missing key, or a value that can't be; names file and key.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{path} can't be read as a study: {reason}; name a file as in configs/study/") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold {', '.join(_KEYS)}, not a {type(values).__name__}")
    for key in values:
        if key not in _KEYS:
            raise ValueError(f"{path}: no key {key!r}{nearest(str(key), _KEYS)}; a study has {', '.join(_KEYS)}")
    for key in _REQUIRED:
        if key not in values:
            raise ValueError(f"{path} lacks {key}; a study needs {', '.join(_REQUIRED)}")
    tune = values.get("tune") or {}
    if not isinstance(tune, dict) or (tune and set(tune) != {"seeds", "learning_rates"}):
        raise ValueError(f"{path}: tune is {tune!r}; write {{seeds: [...], learning_rates: [...]}}")
    study = Study(
        path=path,
        files=tuple(_files(path, values["config"])),
        options=_sections(path, "options", values.get("options") or {}),
        seeds=_seeds(path, "seeds", values["seeds"]),
        cases=_named(path, "cases", values.get("cases") or {path.stem: {}}),
        arms=_named(path, "arms", values["arms"]),
        reference=values["reference"],
        keep=values.get("keep", 0.9),
        tuning_seeds=_seeds(path, "tune.seeds", tune["seeds"]) if tune else (),
        learning_rates=_rates(path, tune["learning_rates"]) if tune else (),
    )
    if study.reference not in study.arms:
        raise ValueError(
            f"{path}: reference is {study.reference!r}{nearest(str(study.reference), study.arms)}; name one of the "
            f"arms, {', '.join(study.arms)}"
        )
    if not _is_number(study.keep) or not 0 < study.keep <= 1:
        raise ValueError(f"{path}: keep is {study.keep!r}; use a share above 0 and at most 1, such as 0.9")
    if shared := sorted(set(study.seeds) & set(study.tuning_seeds)):
        raise ValueError(
            f"{path}: seeds and tune.seeds share {shared}; a rate looks best on the seeds that chose it: tune on others"
        )
    if study.learning_rates:
        for name, layer in {"options": study.options, **study.cases, **study.arms}.items():
            if isinstance(layer.get("optimizer"), dict) and "learning_rate" in layer["optimizer"]:
                raise ValueError(
                    f"{path}: {name} sets {RATE}, which tune.learning_rates chooses; leave one of the two out"
                )
    return study


def _files(path: Path, value: Any) -> list[Path]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: config is {value!r}; name a YAML file or a list of them, relative to the study's")
    return [path.parent / Path(name).expanduser() for name in names]


def _named(path: Path, key: str, value: Any) -> dict[str, dict[str, Any]]:
    """Layers by name; the names become parts of folders' names."""
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path}: {key} is {value!r}; write {{name: {{section: {{option: value}}}}}}")
    for name in value:
        if not isinstance(name, str) or not name.replace("_", "").replace("+", "").replace(".", "").isalnum():
            raise ValueError(f"{path}: {key} has the name {name!r}; use letters, digits, '_', '+' and '.'")
    return {name: _sections(path, f"{key}.{name}", layer or {}) for name, layer in value.items()}


def _sections(path: Path, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} is {value!r}; write sections of options, such as {{train: {{...}}}}")
    for option in _OURS:
        section, field = option.split(".")
        if isinstance(value.get(section), dict) and field in value[section]:
            raise ValueError(f"{path}: {key} sets {option}, which the study sets for every run; leave it out")
    return value


def _seeds(path: Path, key: str, value: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or not value
        or not all(type(seed) is int and 0 <= seed <= LARGEST_SEED for seed in value)
        or len(set(value)) < len(value)
    ):
        raise ValueError(f"{path}: {key} is {value!r}; list different whole numbers from 0 to {LARGEST_SEED}")
    return tuple(value)


def _rates(path: Path, value: Any) -> tuple[float, ...]:
    # YAML reads 1e-4 as text
    rates = [float(rate) if _reads_as_number(rate) else None for rate in value] if isinstance(value, list) else []
    if not rates or any(rate is None or not 0 < rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
        raise ValueError(f"{path}: tune.learning_rates is {value!r}; list different numbers above 0")
    return tuple(rate for rate in rates if rate is not None)


def _reads_as_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
