"""Every option, as dataclasses; `load_config(argv)` makes one Config of defaults, YAML and `section.field=value`.

The only module that imports OmegaConf. A typo answers with the nearest name. Values are checked here as far as they can
be without the model; what depends on it (windows, schedulers) is checked when it is built, before anything runs.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrf_fast.registry import nearest
from hrf_fast.rewards.registry import RewardTerm


@dataclass
class ModelConfig:
    """The pretrained model to fine-tune."""

    name: str = "fashion"
    """`fashion` or `portraits` (shipped), a diffusers folder, or a hub id such as google/ddpm-celebahq-256."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""


@dataclass
class SampleConfig:
    """How images are denoised, in training and in evaluation."""

    scheduler: str = "ddim"
    """ddim, or ddpm for ancestral sampling."""
    num_inference_steps: int = 40
    """T; the paper uses 40."""
    eta: float = 1.0
    """DDIM's noise scale in (0, 1]; 1 for ddpm."""
    batch_size: int = 64
    """Images per UNet call where nothing is trained: anchors, search, panels."""


@dataclass
class WindowConfig:
    """Which denoising steps are trained."""

    schedule: str = "clusters"
    """full (DDPO), clusters (HRF), dynamic (HRF-D), random, sliding, or module:function."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """The schedule's own options, e.g. {clusters: [[0, 20], [20, 40]], iterations_per_cluster: 35}."""


@dataclass
class RewardConfig:
    """What is maximised: one reward by name, or a weighted sum of `terms`."""

    name: str | None = "jpeg_compressibility"
    """A name from `hrf rewards` or module:function; null when `terms` are given."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """The reward's own options."""
    terms: list[RewardTerm] = field(default_factory=list)
    """Terms {name, weight, kwargs} of a weighted sum."""


@dataclass
class TrainConfig:
    """The RL update. Defaults are those of the HRF authors' code where it has them."""

    iterations: int = 70
    """Rollout and update, this many times."""
    groups_per_iteration: int = 4
    """Anchors, and so groups, per iteration."""
    group_size: int = 5
    """Samples that share an anchor; at least 2."""
    groups_per_step: int = 1
    """Groups averaged into one optimizer step; 1 as published. Must divide groups_per_iteration."""
    inner_epochs: int = 1
    """Passes over an iteration's rollouts."""
    advantages: str = "group"
    """Peers that rewards are standardised against: group, or batch for the whole iteration."""
    advantage_floor: float = 1e-6
    """Least standard deviation to divide by, in units of the reward."""
    advantage_clip: float = 2.5
    """Bound on |advantage|."""
    clip_range: float = 1e-4
    """Half-width of the ratio's range; log-probs are means over pixels, so useful values are small."""
    scale_clips_by_window: bool = True
    """Multiply both clips by (T − start)/T, as HRF does; the full window of DDPO has factor 1."""
    learning_rate: float = 5e-6
    """Peak learning rate of AdamW."""
    learning_rate_schedule: str = "constant"
    """constant or cosine (to zero at the last iteration)."""
    warmup_iterations: int = 0
    """Iterations of linear warm-up."""
    weight_decay: float = 1e-3
    """AdamW's decoupled weight decay."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's two averaging factors."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns it off."""
    micro_batch_size: int = 0
    """Samples per UNet call of a window, in rollout and update alike; 0 is the whole group."""
    steps_per_forward: int = 1
    """Consecutive window steps that the update puts into one UNet call; 1 keeps the on-policy ratio exactly 1."""
    precision: str = "fp32"
    """fp32, or bf16 for autocast with fp32 weights."""
    max_evaluations: int = 0
    """Stop after the iteration in which the UNet's evaluations pass this number (a backward counts two); 0 never."""


@dataclass
class EvaluationConfig:
    """The panel: images from fixed noise, scored before, during and after."""

    every: int = 10
    """Iterations between panels; 0 for only the first and last."""
    panel_size: int = 128
    """Images in the panel."""
    seed: int = 1234
    """Of the panel's noise; independent of run.seed."""
    scorer: str = "auto"
    """Features for the Vendi Score: auto (a shipped model's own, else none), none, a shipped name, hub id or folder."""
    grid_size: int = 64
    """Images of the panel that the PNG grids show."""
    resamples: int = 1000
    """Bootstrap resamples behind the 95 % intervals."""


@dataclass
class RunConfig:
    """Where and how the run happens."""

    folder: str = "runs/default"
    """Everything is written below it; the same command resumes from it."""
    seed: int = 0
    """Of all randomness in training."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda or cuda:N."""
    save_every: int = 10
    """Iterations between checkpoints; 0 for only the last."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    writers: list[str] = field(default_factory=list)
    """Besides metrics.jsonl: tensorboard, wandb (logged in by `wandb login`)."""
    progress: str = "auto"
    """auto (bar on a terminal, else json), bar, json or quiet."""


@dataclass
class Config:
    """All sections of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    window: WindowConfig = field(default_factory=WindowConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)


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
    "sample.scheduler": ("ddim", "ddpm"),
    "train.advantages": ("group", "batch"),
    "train.learning_rate_schedule": ("constant", "cosine"),
    "train.precision": ("fp32", "bf16"),
    "run.progress": ("auto", "bar", "json", "quiet"),
}
WRITERS = ("tensorboard", "wandb")


def load_config(argv: Sequence[str]) -> Config:
    """Defaults, then each `--config FILE` in order, then `section.field=value`.

    A YAML file may name others to start from: `base: other.yaml`, relative to itself.

    Raises:
        ValueError: an unknown option (with the nearest name), a value of the wrong type or out of range, no such file.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    files, overrides = _split(argv)
    merged = OmegaConf.structured(Config)
    try:
        for name in files:
            merged = _merge(merged, _read(Path(name), ()))
        for override in overrides:
            key, separator, _ = override.partition("=")
            if not separator:
                raise ValueError(f"{override!r} is not an option; write section.field=value, or --config FILE")
            layer = OmegaConf.from_dotlist([override])
            _check_names(OmegaConf.to_container(layer), override)
            merged = _merge(merged, layer)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{error.full_key or 'the configuration'}: {reason}; `hrf train --help` shows its type"
        ) from error
    assert isinstance(config, Config)
    check_config(config)
    return config


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(config files, overrides) of an argument list; the DeepSpeed launcher's --local_rank is dropped."""
    files, overrides, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        if word.startswith("--local_rank"):
            if word == "--local_rank":
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
    import yaml
    from omegaconf import OmegaConf

    if not path.is_file():
        others = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ValueError(f"--config {path} does not exist{nearest(str(path), others)}")
    if path.resolve() in seen:
        raise ValueError(f"{path} is its own base; remove the circle")
    try:
        layer = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    values = OmegaConf.to_container(layer)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections such as `train:`, not a {type(values).__name__}")
    bases = values.pop("base", [])
    _check_names(values, str(path))
    parents = [
        _read(path.parent / base, (*seen, path.resolve())) for base in ([bases] if isinstance(bases, str) else bases)
    ]
    merged = OmegaConf.create({})
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
        if value(option) < least:
            raise ValueError(f"{option} is {value(option)}; use at least {least}")
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
    if len(train.adam_betas) != 2 or not all(0 <= beta < 1 for beta in train.adam_betas):
        raise ValueError(f"train.adam_betas is {list(train.adam_betas)}; use two numbers in [0, 1)")
    for writer in config.run.writers:
        if writer not in WRITERS:
            raise ValueError(f"run.writers has {writer!r}{nearest(writer, WRITERS)}; use {', '.join(WRITERS)}")
    if bool(config.reward.name) == bool(config.reward.terms):
        raise ValueError("set either reward.name or reward.terms (with reward.name=null), not both and not neither")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ValueError(f"WORLD_SIZE is {world_size}, but training on several processes is not supported; launch one")


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
