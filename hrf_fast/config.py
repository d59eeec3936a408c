"""`load_config(argv)`: one Config of defaults, YAML layers and `section.field=value`. The options are in options.py.

The only module that imports OmegaConf. A typo answers with the nearest name. Values are checked here as far as they can
be without the model; what depends on it (windows, schedulers) is checked when it is built, before anything runs.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hrf_fast.amounts import parse_memory
from hrf_fast.deepspeed_settings import read_settings
from hrf_fast.optimizers import check_optimizer
from hrf_fast.options import (
    ACTIVATIONS,
    ATTENTIONS,
    COMPILES,
    KERNELS,
    LEARNING_RATE_SCHEDULES,
    OPTIMIZERS,
    ORDERS,
    PRECISIONS,
    SAMPLERS,
    Config,
    TrainConfig,
)
from hrf_fast.registry import nearest

SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config)}

# least value of every number; a choice of every named option
_AT_LEAST = {
    "sample.num_inference_steps": 1,
    "sample.batch_size": 1,
    "train.iterations": 1,
    "train.groups_per_iteration": 1,
    "train.group_size": 2,
    "train.groups_per_step": 1,
    "train.inner_epochs": 1,
    "train.warmup_iterations": 0,
    "train.weight_decay": 0,
    "train.max_grad_norm": 0,
    "train.micro_batch_size": 0,
    "train.max_batch": 0,
    "train.steps_per_forward": 1,
    "train.max_evaluations": 0,
    "evaluation.every": 0,
    "evaluation.panel_size": 2,
    "evaluation.seed": 0,
    "evaluation.grid_size": 1,
    "evaluation.resamples": 100,
    "run.seed": 0,
    "run.save_every": 0,
    "run.keep_checkpoints": 1,
}
_ABOVE_ZERO = (
    "train.learning_rate",
    "train.clip_range",
    "train.advantage_clip",
    "train.advantage_floor",
    "train.adam_eps",
)
_CHOICES = {
    "model.attention": ATTENTIONS,
    "sample.scheduler": SAMPLERS,
    "train.advantages": ("group", "batch"),
    "train.learning_rate_schedule": LEARNING_RATE_SCHEDULES,
    "train.precision": PRECISIONS,
    "train.kernels": KERNELS,
    "train.activations": ACTIVATIONS,
    "train.order": ORDERS,
    "train.compile": COMPILES,
    "train.self_check": ("warn", "strict"),
    "train.on_nan": ("stop", "skip"),
    "train.optimizer": OPTIMIZERS,
    "run.progress": ("auto", "bar", "json", "quiet"),
}
# seeds.py makes keys of 32 bits
_LARGEST_SEED = 2**32 - 1
WRITERS = ("tensorboard", "wandb")


def load_config(argv: Sequence[str]) -> Config:
    """Defaults, then each `--config FILE` in order, then all `section.field=value` as one layer.

    A YAML file may name others to start from: `base: other.yaml`, relative to itself.

    Raises:
        ValueError: an unknown option (with the nearest name), a value of the wrong type or out of range, no such file.
    """
    from omegaconf import OmegaConf

    files, overrides = _split(argv)
    merged = OmegaConf.structured(Config)
    for name in files:
        layer = _read(Path(name), ())
        with _naming(name):
            merged = _merge(merged, layer)
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
def _naming(source: str) -> Iterator[None]:
    """What YAML and OmegaConf raise about `source`, a word or a file, becomes a ValueError that names it."""
    import yaml
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key and not source.startswith(error.full_key) else ""
        raise ValueError(f"{source}: {key}{str(error).splitlines()[0]}; `hrf train --help` shows its type") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error
    except TypeError as error:
        # OmegaConf's own "Cannot merge incompatible container types" does not say which
        raise ValueError(
            f"{source} has a list where a mapping belongs, or the reverse; "
            "write a list whole, as [a, b], and a mapping as {name: value}"
        ) from error


def _check_override(word: str) -> None:
    """Refuse one `section.field=value` that is wrong by itself, so that the message names this word only."""
    from omegaconf import OmegaConf

    if "=" not in word:
        raise ValueError(f"{word!r} is not an option; write section.field=value, or --config FILE")
    with _naming(word):
        layer = OmegaConf.from_dotlist([word])
        _check_names(OmegaConf.to_container(layer), word)
        _merge(OmegaConf.structured(Config), layer)


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

    if not path.is_file():
        others = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ValueError(f"--config {path} does not exist{nearest(str(path), others)}")
    if path.resolve() in seen:
        raise ValueError(f"{path} is its own base; remove the circle")
    with _naming(str(path)):
        values = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections such as `train:`, not a {type(values).__name__}")
    base = values.pop("base", [])
    bases = [base] if isinstance(base, str) else base
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise ValueError(f"{path}: base is {base!r}; name a YAML file or a list of them, or leave it out")
    _check_names(values, str(path))
    parents = [_read(path.parent / name, (*seen, path.resolve())) for name in bases]
    merged = OmegaConf.create({})
    with _naming(str(path)):
        for layer in (*parents, OmegaConf.create(values)):
            merged = _merge(merged, layer)
    return merged


def _merge(config: Any, layer: Any) -> Any:
    """`layer` over `config`; another schedule or reward starts with its own options, not with the old one's."""
    from omegaconf import OmegaConf

    for section, selector in (("window", "schedule"), ("reward", "name")):
        new, old = layer.get(section), config.get(section)
        if new and old and selector in new and new[selector] != old.get(selector):
            old.kwargs = {}
    return OmegaConf.merge(config, layer)


def _check_names(values: Any, source: str) -> None:
    for section, options in values.items():
        if section not in SECTIONS:
            raise ValueError(
                f"{source}: no section {section!r}{nearest(str(section), SECTIONS)}; use {', '.join(SECTIONS)}"
            )
        if options is None:
            continue
        if not isinstance(options, dict):
            raise ValueError(f"{source}: {section} is a section; write {section}.field=value")
        names = [f.name for f in dataclasses.fields(SECTIONS[section])]
        for name in options:
            if name not in names:
                raise ValueError(
                    f"{source}: no option {section}.{name}{nearest(str(name), names)}; use {', '.join(names)}"
                )


def check_config(config: Config) -> None:
    """Refuse values out of range and combinations that can't work.

    Raises:
        ValueError: names the option, its value, the rule and the way out.
    """

    def value(option: str) -> Any:
        section, name = option.split(".")
        return getattr(getattr(config, section), name)

    for option, least in _AT_LEAST.items():
        # written so that NaN fails too
        if not value(option) >= least:
            raise ValueError(f"{option} is {value(option)}; use at least {least}")
        if value(option) == float("inf"):
            raise ValueError(f"{option} is inf; use a finite number")
    for option in ("run.seed", "evaluation.seed"):
        if value(option) > _LARGEST_SEED:
            raise ValueError(f"{option} is {value(option)}; use at most {_LARGEST_SEED} (2^32 - 1)")
    for option in _ABOVE_ZERO:
        if not 0 < value(option) < float("inf"):
            raise ValueError(f"{option} is {value(option)}; use a finite number above 0")
    for option, choices in _CHOICES.items():
        if value(option) not in choices:
            raise ValueError(
                f"{option} is {value(option)!r}{nearest(value(option), choices)}; use {', '.join(choices)}"
            )
    train = config.train
    if train.groups_per_iteration % train.groups_per_step:
        raise ValueError(
            f"train.groups_per_step is {train.groups_per_step}, which does not divide train.groups_per_iteration "
            f"{train.groups_per_iteration}; choose a divisor"
        )
    _check_order(train)
    if len(train.adam_betas) != 2 or not all(0 <= beta < 1 for beta in train.adam_betas):
        raise ValueError(f"train.adam_betas is {list(train.adam_betas)}; use two numbers in [0, 1)")
    check_optimizer(train.optimizer, config.engine.deepspeed)
    for writer in config.run.writers:
        if writer not in WRITERS:
            raise ValueError(f"run.writers has {writer!r}{nearest(writer, WRITERS)}; use {', '.join(WRITERS)}")
    if bool(config.reward.name) == bool(config.reward.terms):
        raise ValueError("set either reward.name or reward.terms (with reward.name=null), not both and not neither")
    if not 0 <= train.ema_decay < 1:
        raise ValueError(f"train.ema_decay is {train.ema_decay}; use a number in [0, 1), such as 0.999, or 0 for none")


def _check_order(train: TrainConfig) -> None:
    """What the order of updates, the batches of rollouts and the keeping of graphs ask of each other."""
    if train.activations == "keep" and train.order != "on_policy":
        raise ValueError(
            f"train.activations is keep but train.order is {train.order}: kept graphs must be used before the weights "
            "change; use train.order=on_policy, or train.activations=replay"
        )
    if train.activations == "keep" and train.inner_epochs > 1:
        raise ValueError(
            f"train.activations is keep but train.inner_epochs is {train.inner_epochs}: a kept graph serves one epoch; "
            "use train.inner_epochs=1, or train.activations=replay"
        )
    parted = train.order == "on_policy" and train.groups_per_step != train.groups_per_iteration
    if train.advantages == "batch" and parted:
        raise ValueError(
            "train.advantages is batch but train.order is on_policy: peers must be rolled out together; use "
            f"train.groups_per_step={train.groups_per_iteration}, or train.order=collect"
        )
    if 0 < train.max_batch < train.group_size:
        raise ValueError(
            f"train.max_batch is {train.max_batch} but train.group_size is {train.group_size}: it joins whole groups; "
            "use at least that, 0 for one by one, or split groups by train.micro_batch_size"
        )
    if train.max_batch and 0 < train.micro_batch_size < train.group_size:
        raise ValueError(
            f"train.max_batch is {train.max_batch}, which joins groups, but train.micro_batch_size is "
            f"{train.micro_batch_size}, which splits them; set one of them to 0"
        )
    if train.memory_budget is not None:
        parse_memory(train.memory_budget, "train.memory_budget")
        if train.activations != "auto":
            raise ValueError(
                f"train.memory_budget is {train.memory_budget} but train.activations is {train.activations}, which "
                "plans nothing; use train.activations=auto, or leave the budget out"
            )


def check_job(config: Config, world_size: int) -> None:
    """Refuse a configuration that the ranks of a job can't share evenly, or a DeepSpeed file that can't work.

    Raises:
        ValueError: names the option, its value and the way out.
    """
    if config.engine.deepspeed is not None:
        stage = read_settings(config.engine.deepspeed)["zero_optimization"].get("stage", 0)
        if stage == 3 and config.train.activations == "keep":
            raise ValueError(
                f"train.activations is keep but {config.engine.deepspeed} is ZeRO-3, which takes the weights away "
                "after each forward; use replay, checkpoint or a stage up to 2"
            )
        if stage == 3 and config.train.compile != "none":
            raise ValueError(
                f"train.compile is {config.train.compile!r}, but engine.deepspeed {config.engine.deepspeed} is ZeRO-3, "
                "whose hooks gather each layer's weights around its forward, and can't be compiled; use ZeRO 0 to 2, "
                "the plain engine (null), or train.compile=none"
            )
    # groups_per_step divides groups_per_iteration
    if config.train.groups_per_step % world_size:
        raise ValueError(
            f"train.groups_per_step is {config.train.groups_per_step}, which {world_size} ranks can't share evenly (an "
            "optimizer step averages over its groups, and every rank takes as many of them); set it to a multiple of "
            f"{world_size} that divides train.groups_per_iteration {config.train.groups_per_iteration}, or launch "
            "another number of ranks"
        )
    if world_size > 1 and config.run.device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"run.device is {config.run.device!r} but there are {world_size} ranks; use auto, cuda or cpu: each rank "
            "takes the GPU of its LOCAL_RANK"
        )


def to_yaml(config: Config) -> str:
    """The whole configuration as a valid `--config` file."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Options whose values differ, as {"section.field": (in a, in b)}."""
    pairs = ((f"{s}.{name}", old, new) for s in SECTIONS for name, old, new in _fields(getattr(a, s), getattr(b, s)))
    return {option: (old, new) for option, old, new in pairs if old != new}


def _fields(a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    return ((f.name, getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))


def describe_options() -> str:
    """Every option with its type, default and docstring, for `hrf train --help`."""
    lines = []
    for section, factory in SECTIONS.items():
        lines.append(f"\n{section}: {factory.__doc__}")
        tree: Any = ast.parse(inspect.getsource(factory))
        body: list[Any] = tree.body[0].body
        docs = {
            node.target.id: text.value.value
            for node, text in zip(body, body[1:], strict=False)
            if hasattr(node, "target") and hasattr(text, "value")
        }
        default = factory()
        lines += [f"  {section}.{name}={getattr(default, name)!r}\n      {doc}" for name, doc in docs.items()]
    return "\n".join(lines)
