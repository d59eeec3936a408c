"""`load_config(argv)`: one Config of defaults, YAML layers and `section.field=value`. The options are in options.py.

The only module that imports OmegaConf. A typo answers with the nearest name, an old name with the new one. What values
may be is in rules.py.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hrf_fast.config.credentials import without_credentials
from hrf_fast.config.options import SECTIONS, Config
from hrf_fast.config.rules import check_config
from hrf_fast.config.shapes import check_layer, missing_space
from hrf_fast.errors import read_utf8
from hrf_fast.registry import nearest


def load_config(argv: Sequence[str], layers: Mapping[str, dict[str, Any]] | None = None) -> Config:
    """Defaults, then each `--config FILE` in order, then `layers`, then all `section.field=value` as one layer.

    A YAML file may name others to start from: `base: other.yaml`, relative to itself.

    Args:
        layers: sections as a file has them, by the name that an error calls them.

    Raises:
        ValueError: an unknown option (with the nearest name), a value of the wrong type or out of range, no such file.
        TypeError: `argv` is no sequence of words.
    """
    from omegaconf import OmegaConf

    files, overrides = _split(_words(argv))
    merged = copy.deepcopy(_defaults())
    for name in files:
        layer = _read(Path(name).expanduser(), ())
        with _naming(name):
            merged = _merge(merged, layer)
    for name, values in (layers or {}).items():
        check_layer(values, name)
        with _naming(name):
            merged = _merge(merged, OmegaConf.create(values))
    for override in overrides:
        _check_override(override)
    # one layer, so that the order of the words does not matter: options of a new schedule may come before its name
    with _naming(" ".join(overrides)):
        merged = _merge(merged, OmegaConf.from_dotlist(overrides))
    with _naming("the configuration"):
        config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    check_config(config)
    return config


@contextmanager
def _naming(source: str, text: str = "") -> Iterator[None]:
    """Turn errors of YAML and OmegaConf about `source`, a word or a file of `text`, into a ValueError that names it."""
    import yaml
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key and not source.startswith(error.full_key) else ""
        raise ValueError(f"{source}: {key}{str(error).splitlines()[0]}; `hrf train --help` shows its type") from error
    except (yaml.YAMLError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        lines = (text or source).splitlines()
        hint = "; YAML wants a space after a colon, as in {name: value}"
        if mark is None or mark.line >= len(lines) or not missing_space(lines[mark.line]):
            hint = ""
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}{hint}") from error
    except TypeError as error:
        # OmegaConf's own "Cannot merge incompatible container types" does not say which
        raise ValueError(
            f"{source} has a list where a mapping belongs, or the reverse; "
            "write a list whole, as [a, b], and a mapping as {name: value}"
        ) from error


def _words(argv: Any) -> list[str]:
    """The words of a command, of which a file may be a Path."""
    words = list(argv) if isinstance(argv, Iterable) and not isinstance(argv, str | Mapping) else [argv]
    words = [os.fspath(word) if isinstance(word, os.PathLike) else word for word in words]
    if isinstance(argv, str) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"load_config takes a list of words, such as ['model.name=fashion'], and was given {argv!r}")
    return words


def checked(config: Any) -> Config:
    """The configuration; a TypeError says how to make one of anything else."""
    if not isinstance(config, Config):
        raise TypeError(f'config is of {type(config)}; make one by hrf_fast.load_config(["section.field=value", …])')
    return config


def _check_override(word: str) -> None:
    """Refuse one `section.field=value` that is wrong by itself, so that the message names this word only."""
    from omegaconf import OmegaConf

    if "=" not in word:
        file = Path(word) / "config.yaml"
        ways = f"--config {file} for a run's options" if file.is_file() else "--config FILE"
        raise ValueError(f"{word!r} is not an option; write section.field=value, or {ways}")
    with _naming(word):
        layer = OmegaConf.from_dotlist([word])
        values: Any = OmegaConf.to_container(layer)
        check_layer(values, word)
        # its section alone: a merge copies what it goes over
        (section,) = values
        OmegaConf.merge({section: _defaults()[section]}, layer)


@functools.cache
def _defaults() -> Any:
    """The defaults with their types, to copy and never to change; making them takes four times a copy."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(Config)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(config files, overrides) of an argument list; the DeepSpeed launcher's --local_rank is dropped."""
    files, overrides, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        if word.startswith("--local_rank"):
            if word == "--local_rank":
                if not rest:
                    raise ValueError("--local_rank needs a number, e.g. --local_rank=0, or leave it out")
                rest.pop(0)
        elif word == "--config":
            if not rest:
                raise ValueError("--config needs a file, e.g. --config configs/smoke_cpu.yaml")
            files.append(rest.pop(0))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        elif word.startswith("-"):
            raise ValueError(f"{word} is unknown; options are --config FILE and section.field=value")
        else:
            overrides.append(word)
    return files, overrides


def _read(path: Path, seen: tuple[Path, ...]) -> Any:
    """A YAML file merged over the `base` files that it names."""
    from omegaconf import OmegaConf

    if path.is_dir():
        raise ValueError(f"--config {path} is a folder; name a YAML file, as in --config {path / 'config.yaml'}")
    if not path.is_file():
        others = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ValueError(f"--config {path} does not exist{nearest(str(path), others)}")
    if path.resolve() in seen:
        raise ValueError(f"{path} is its own base; remove the circle")
    text = read_utf8(path, "name a YAML file")
    if not text.strip():
        raise ValueError(f"{path} is empty; write sections such as `train:`, or leave --config out")
    with _naming(str(path), text):
        values = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections such as `train:`, not a {type(values).__name__}")
    base = values.pop("base", [])
    bases = [base] if isinstance(base, str) else base
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise ValueError(f"{path}: base is {base!r}; name a YAML file or a list of them, or leave it out")
    check_layer(values, str(path))
    parents = [_read(path.parent / Path(name).expanduser(), (*seen, path.resolve())) for name in bases]
    merged = OmegaConf.create({})
    with _naming(str(path)):
        for layer in (*parents, OmegaConf.create(values)):
            merged = _merge(merged, layer)
    return merged


def _merge(config: Any, layer: Any) -> Any:
    """`layer` over `config`, which is used up; {} clears kwargs, and so does another schedule or reward."""
    from omegaconf import OmegaConf

    for section, new in layer.items():
        if new and new.get("kwargs") == {} and config.get(section):
            config[section].kwargs = {}
    for section, selector in (("window", "schedule"), ("reward", "name"), ("prompts", "source")):
        new, old = layer.get(section), config.get(section)
        if new and old and selector in new:
            # a file that names none has options of the default
            before = old[selector] if selector in old else _defaults()[section][selector]
            if new[selector] != before:
                old.kwargs = {}
    return OmegaConf.unsafe_merge(config, layer)


def to_yaml(config: Config, *, credentials: bool = True) -> str:
    """The whole configuration as a valid `--config` file, without `credentials` as a page for others may show it."""
    from omegaconf import OmegaConf

    options = dataclasses.asdict(config)
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(options if credentials else without_credentials(options))))


def _escaped(value: Any) -> Any:
    """A value whose texts OmegaConf reads as they are, `${` too, which would refer to another option."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + "\\${", value) if isinstance(value, str) else value


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Options whose values differ, as {"section.field": (in a, in b)}."""
    pairs = ((f"{s}.{name}", old, new) for s in SECTIONS for name, old, new in _fields(getattr(a, s), getattr(b, s)))
    return {option: (old, new) for option, old, new in pairs if old != new}


def _fields(a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    return ((f.name, getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
