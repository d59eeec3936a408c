"""Runs: the configuration of a run that a command is about, and the models that are in its folder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hrf_fast.assembly.model import build_policy
from hrf_fast.config.load import differences
from hrf_fast.config.options import Config
from hrf_fast.config.paths import with_absolute_paths
from hrf_fast.config.rules import check_config
from hrf_fast.config.run_options import ComputeConfig
from hrf_fast.devices import choose_device
from hrf_fast.engines.base import trained_weights
from hrf_fast.policies.base import Policy
from hrf_fast.run.checkpoint import WEIGHTS, list_checkpoints, read_weights
from hrf_fast.run.finished import finished_run
from hrf_fast.run.layout import RunFiles
from hrf_fast.run.sources import check_base, check_policy_kind

# options that say what a run's tuned model is
BASE_MODEL = ("model.name", "model.revision", "model.variant")
ADAPTERS = ("lora.rank", "lora.alpha", "lora.targets")
# options and sections that it does not depend on any more
_IDLE = (
    *("evaluation.every", "reward.mix", "prompts.distinct", "engine.deepspeed"),
    *("compute.compile", "compute.activations", "compute.memory_budget", "compute.auto_tune"),
)
_TRAINING = ("train", "window", "optimizer", "remedies", "stop")


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to, or None for a path that is no checkpoint's.

    Raises:
        ValueError: a checkpoint that is in no run's folder, or the folder of all checkpoints of a run.
    """
    # from inside a run's folder too
    path = checkpoint.absolute()
    if checkpoints := list_checkpoints(path):
        raise ValueError(f"{checkpoint} holds the checkpoints of a run; name one of them, such as {checkpoints[0]}")
    if not (path / WEIGHTS).is_file():
        return None
    # the root has no parents
    run = path.parent.parent
    if not RunFiles(run).config_file.is_file():
        raise ValueError(
            f"{checkpoint} is a checkpoint, but {run} has no config.yaml, which says what model it is of; put it back "
            "into RUN/checkpoints"
        )
    return run


def model_of_run(path: Path) -> tuple[Path, Path] | None:
    """A run and the model that a path means: of RUN or RUN/model, of RUN/blend or RUN/blend/model; else None.

    Raises:
        ValueError: the run has no such model.
    """
    # from inside a run's folder too
    path = path.absolute()
    # a run's own folder may have any name, these two as well
    meant = [(path, path)]
    meant += [(path.parent, path.parent)] if path.name == "model" else []
    meant += [(path.parent, path)] if path.name == "blend" else []
    meant += [(path.parents[1], path.parent)] if path.parts[-2:] == ("blend", "model") else []
    run, folder = next((each for each in meant if RunFiles(each[0]).config_file.is_file()), (None, path))
    if run is None:
        return None
    if folder != run and not (folder / "model").is_dir():
        raise ValueError(f"{folder} has no model/, since no blend was chosen; `hrf blend {run}` says why, or makes one")
    return finished_run(run).path, folder / "model"


def tuned_config(run: Path, words: Sequence[str], fixed: Collection[str]) -> Config:
    """A run's configuration with options changed by `words`, but for the `fixed` ones.

    Raises:
        ValueError: a fixed option is another than the run's, or an option of training alone is changed; or see
            `check_policy_kind`.
    """
    # before the reward and the panel, which may have gone with the policy's script
    check_policy_kind(run)
    files = RunFiles(run)
    config, before = files.read_config(words), files.read_config()
    changed = differences(with_absolute_paths(before), with_absolute_paths(config))
    _check_effect(before, config, changed)
    for option in fixed:
        if option in changed:
            old, new = changed[option]
            hint = f"; if that model has moved, write its new place into {files.config_file}"
            raise ValueError(
                f"{option} is {new!r}, but the tuned model of {run} is of {old!r}; leave {option} out"
                + (hint if option == "model.name" else "")
            )
    return config


def _check_effect(before: Config, config: Config, changed: Collection[str]) -> None:
    """Refuse options of training alone, but for those that the others ask for, as a number of steps does."""
    idle = [option for option in changed if _is_idle(option)]
    if not idle:
        return
    try:
        reward = replace(config.reward, mix=before.reward.mix)
        check_config(replace(config, reward=reward, **{section: getattr(before, section) for section in _TRAINING}))
    except ValueError:
        return
    raise ValueError(f"{idle[0]} would change nothing here, since nothing is trained; leave it out")


def _is_idle(option: str) -> bool:
    """Whether a tuned model and its panels do not depend on an option any more."""
    section = option.partition(".")[0]
    return section in _TRAINING or option in _IDLE or (section == "run" and option != "run.device")


def run_policy(run: Path, config: Config, name: str | None = None) -> Policy:
    """The policy of `build_policy` for a run, whose pretrained weights are those that it was trained beside.

    Raises:
        ValueError: see `check_base` and `check_policy_kind`.
    """
    check_policy_kind(run)
    policy = build_policy(config, name)
    if policy.network.base_digest:
        check_base(run, config.model.name, policy.network.base_digest)
    return policy


def with_sampler(config: Config, device: str, sampler: dict[str, Any]) -> Config:
    """The configuration with fields of its sample section replaced, on `device`.

    In fp32 on a CPU, which may lack what a GPU has trained by; on a GPU in the run's precision and with its offload,
    since a model that was trained there need not fit in fp32.
    """
    compute, lora = ComputeConfig(), replace(config.lora, base_precision="fp32")
    if choose_device(device).type == "cuda":
        same = {name: getattr(config.compute, name) for name in ("precision", "offload", "encoder_precision")}
        compute, lora = replace(compute, **same), config.lora
    return replace(
        config,
        sample=replace(config.sample, **sampler),
        run=replace(config.run, device=device),
        compute=compute,
        lora=lora,
    )


def checkpoint_policy(run: Path, config: Config, checkpoint: Path) -> Policy:
    """The policy of `run_policy` with a checkpoint's weights, averaged ones if there are any; see `read_weights`."""
    policy = run_policy(run, config)
    trained = trained_weights(policy.network)
    weights = read_weights(checkpoint, {name: tuple(weight.shape) for name, weight in trained.items()})
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(weights[name])
    return policy
