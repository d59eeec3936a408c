"""Reading: a study's file, held to its keys and types. What it says of runs is held to the options by `Study.check`."""

from __future__ import annotations

import io
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from hrf_fast.config.rules import is_number
from hrf_fast.config.run_options import LARGEST_SEED
from hrf_fast.errors import read_utf8
from hrf_fast.evaluation.blend import steps_to
from hrf_fast.registry import nearest
from hrf_fast.study.plan import RATE, BlendOf, Study

_KEYS = ("config", "options", "seeds", "cases", "arms", "reference", "keep", "tune", "commits")
_REQUIRED = ("config", "seeds", "arms", "reference")
# what a study sets for every run
_OURS = ("run.seed", "run.folder", "run.progress")


def read_study(path: Path) -> Study:
    """Read a study's file.

    Raises:
        ValueError: no such file, no YAML, an unknown or missing key, or a value that can't be; names file and key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    text = read_utf8(path, "name a file as in configs/study/")
    try:
        # as configurations are read: 1e-4 is a number, and a name that comes twice is an error
        values = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
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
    keep = values.get("keep", 0.9)
    if not is_number(keep) or not 0 < keep <= 1:
        raise ValueError(f"{path}: keep is {keep!r}; use a share above 0 and at most 1, such as 0.9")
    arms, blends = _arms(path, values["arms"], keep)
    study = Study(
        path=path,
        files=tuple(_files(path, values["config"])),
        options=_sections(path, "options", values.get("options") or {}),
        seeds=_seeds(path, "seeds", values["seeds"]),
        cases=_named(path, "cases", values.get("cases") or {re.sub(r"[^\w+.]", "_", path.stem): {}}),
        arms=arms,
        blends=blends,
        reference=values["reference"],
        keep=keep,
        commits=_commits(path, values.get("commits") or []),
        tuning_seeds=_seeds(path, "tune.seeds", tune["seeds"]) if tune else (),
        learning_rates=_rates(path, tune["learning_rates"]) if tune else (),
    )
    if not isinstance(study.reference, str) or study.reference not in study.arms:
        raise ValueError(
            f"{path}: reference is {study.reference!r}{nearest(str(study.reference), study.arms)}; name one of the "
            f"arms, {', '.join(study.arms)}"
        )
    if shared := sorted(set(study.seeds) & set(study.tuning_seeds)):
        raise ValueError(
            f"{path}: seeds and tune.seeds share {shared}; a rate looks best on the seeds that chose it: tune on others"
        )
    if study.learning_rates:
        trained = {name: layer for name, layer in study.arms.items() if name not in study.blends}
        for name, layer in {"options": study.options, **study.cases, **trained}.items():
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


def _arms(path: Path, value: Any, keep: float) -> tuple[dict[str, dict[str, Any]], dict[str, BlendOf]]:
    """Layers by arm, of blends those of the arm that they are of, and what is blended by arm."""
    layers = value if isinstance(value, dict) else {}
    blends = {name: layer for name, layer in layers.items() if isinstance(layer, dict) and "blend" in layer}
    arms = _named(path, "arms", {name: {} if name in blends else layer for name, layer in layers.items()} or value)
    trained = [name for name in arms if name not in blends]
    read = {name: _blend(f"{path}: arms.{name}", layer, trained, keep) for name, layer in blends.items()}
    by_arm: dict[str, str] = {}
    for name, blend in read.items():
        if (twin := by_arm.setdefault(blend.arm, name)) != name:
            raise ValueError(f"{path}: arms.{name} and {twin} both blend {blend.arm}, in one folder; leave one out")
    return {name: arms[read[name].arm] if name in read else layer for name, layer in arms.items()}, read


def _blend(key: str, layer: dict[str, Any], trained: list[str], keep: float) -> BlendOf:
    """An arm of blends, of one of the arms that are trained."""
    blend, known = layer["blend"], [field.name for field in fields(BlendOf) if field.name != "keep"]
    example = "{blend: {arm: ddpo, most: 1.5, step: 0.25}}"
    if set(layer) != {"blend"} or not isinstance(blend, dict) or set(blend) != set(known):
        raise ValueError(f"{key} is {layer!r}, but blends have {', '.join(known)} alone: {example}")
    if blend["arm"] not in trained:
        raise ValueError(
            f"{key} blends {blend['arm']!r}{nearest(str(blend['arm']), trained)}; name an arm that is trained, "
            f"{', '.join(trained) or 'which this study lacks'}"
        )
    if not is_number(blend["most"]) or not is_number(blend["step"]):
        raise ValueError(f"{key} is {layer!r}; most and step are numbers: {example}")
    try:
        steps_to(blend["most"], blend["step"])
    except ValueError as error:
        raise ValueError(f"{key}: {str(error).replace('--', '')}") from None
    return BlendOf(blend["arm"], float(keep), float(blend["most"]), float(blend["step"]))


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


def _commits(path: Path, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(commit, str) for commit in value):
        raise ValueError(f"{path}: commits is {value!r}; list those of lines that count, in quotes")
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
