"""Commands on finished models: draw a grid, evaluate a run's tuned model, export a checkpoint."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrf_fast.assembly.inputs import build_config_reward, build_panel, build_prompted_panel, build_prompts
from hrf_fast.assembly.model import build_policy
from hrf_fast.config.load import differences, load_config
from hrf_fast.config.options import FLOW_SAMPLERS, Config
from hrf_fast.config.paths import with_absolute_paths
from hrf_fast.config.run_options import ComputeConfig
from hrf_fast.devices import choose_device, set_precision_flags
from hrf_fast.engines.base import trained_weights
from hrf_fast.evaluation.detail import LEAST, detail
from hrf_fast.evaluation.grids import save_grid
from hrf_fast.evaluation.kept import kept_interval
from hrf_fast.evaluation.panel import Panel
from hrf_fast.evaluation.peer import peer_columns
from hrf_fast.policies.base import Policy
from hrf_fast.policies.load import load_policy
from hrf_fast.policies.lora import merged
from hrf_fast.policies.sample import sample
from hrf_fast.prompts import Prompt
from hrf_fast.report.evaluation import evaluation_lines
from hrf_fast.run.card import save_model
from hrf_fast.run.checkpoint import WEIGHTS, list_checkpoints, read_weights
from hrf_fast.run.files import PANEL, read_log, write_atomically
from hrf_fast.run.finished import finished_run
from hrf_fast.run.folder import check_base

# options that say what a run's tuned model is
BASE_MODEL = ("model.name", "model.revision", "model.variant")
ADAPTERS = ("lora.rank", "lora.alpha", "lora.targets")


def draw(
    model: str,
    out: Path,
    *,
    count: int,
    images_per_call: int,
    seed: int,
    device: str,
    variant: str | None = None,
    prompts: Sequence[str] = (),
    negatives: Sequence[str] = (),
    **sampler: Any,
) -> None:
    """Write a grid of images of a model, a run or one of its checkpoints.

    Args:
        variant: of the weight files of a model's folder or a hub id.
        prompts: of equally many images each; none for those of the run's panel.
        negatives: one for all prompts, or one for each.
        sampler: scheduler, steps, eta and guidance; None for a run's own, or the defaults of `load_policy`.

    Raises:
        ValueError: no such model, a run that is not finished, a count below 1, or prompts that the model does not take.
    """
    if count < 1 or images_per_call < 1:
        raise ValueError(f"--count is {count} and --images-per-call {images_per_call}; both must be at least 1")
    # the same seed draws the same grid
    set_precision_flags(choose_device(device), deterministic=True)
    policy = _policy(model, device, variant, {name: value for name, value in sampler.items() if value is not None})
    panel = _prompted(Panel(count, seed, images_per_call), model, policy, prompts, negatives)
    each = [panel.prompt(image) for image in range(count)]
    images = policy.decode(sample(policy, panel.noise(policy), each, images_per_call=images_per_call)).cpu()
    save_grid(images, out, captions=panel.texts, images_per_prompt=panel.images_per_prompt)


def _prompted(panel: Panel, model: str, policy: Policy, prompts: Sequence[str], negatives: Sequence[str]) -> Panel:
    """The panel with the prompts to draw: those given, else those of the run's own panel.

    Raises:
        ValueError: prompts for a model that takes none, none for a model that is no run's, more prompts than images,
            or another number of negative prompts.
    """
    if not policy.takes_prompts:
        if prompts or negatives:
            raise ValueError(f"{'--prompt' if prompts else '--negative'} is given, but {model} takes no prompts")
        return panel
    if len(negatives) > 1 and len(negatives) != len(prompts):
        raise ValueError(
            f"--negative is given {len(negatives)} times and --prompt {len(prompts)} times; give one negative prompt "
            "for all, or one for each"
        )
    if len(prompts) > panel.size:
        raise ValueError(f"--prompt is given {len(prompts)} times but --count is {panel.size}; draw an image of each")
    if prompts:
        each = negatives if len(negatives) == len(prompts) else [*negatives, ""][:1] * len(prompts)
        asked = tuple(Prompt(text, negative) for text, negative in zip(prompts, each, strict=True))
        return replace(panel, prompts=asked, images_per_prompt=-(-panel.size // len(asked)))
    path = Path(model).expanduser()
    run = _run_of(path) or path
    if not (run / "config.yaml").is_file():
        raise ValueError(f'{model} draws what a prompt says; give one or several, as --prompt "a cat"')
    config = run_config(run)
    of_run = build_prompted_panel(config, build_prompts(config)[0])
    asked = tuple(replace(prompt, negative=(*negatives, prompt.negative)[0]) for prompt in of_run.prompts)
    return replace(panel, prompts=asked, images_per_prompt=of_run.images_per_prompt)


def _policy(model: str, device: str, variant: str | None, sampler: dict[str, Any]) -> Policy:
    """A model by name, or a run's tuned model or checkpoint under the sampler that it was trained with."""
    path = Path(model).expanduser()
    run = _run_of(path)
    folder = run or path
    config = run_config(folder) if (folder / "config.yaml").is_file() else None
    _check_noise(sampler, sampler.get("sampler") or ("ddim" if config is None else config.sample.scheduler))
    if config is None:
        return load_policy(model, variant=variant, **sampler, device=choose_device(device))
    if variant is not None:
        raise ValueError(f"--variant is {variant!r}, but {model} is of a run, whose weights have none; leave it out")
    if run is None:
        return run_policy(finished_run(path), _with_sampler(config, device, sampler), str(path / "model"))
    policy = run_policy(run, _with_sampler(config, device, sampler))
    load_weights(policy, path)
    return policy


def run_policy(run: Path, config: Config, name: str | None = None) -> Policy:
    """The policy of `build_policy` for a run, whose pretrained weights are those that it was trained beside.

    Raises:
        ValueError: see `check_base`.
    """
    policy = build_policy(config, name)
    if policy.network.base_digest:
        check_base(run, config.model.name, policy.network.base_digest)
    return policy


def _check_noise(sampler: Mapping[str, Any], kind: str) -> None:
    """Refuse the noise scale of another kind of sampler than `kind`."""
    wrong, right = ("eta", "noise_level") if kind in FLOW_SAMPLERS else ("noise_level", "eta")
    if wrong in sampler:
        raise ValueError(
            f"--{wrong.replace('_', '-')} is {sampler[wrong]:g}, but the sampler is {kind}, whose noise scale is "
            f"--{right.replace('_', '-')}; leave it out, or name another sampler by --scheduler"
        )


def _run_of(checkpoint: Path) -> Path | None:
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
    run = path.parents[1]
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"{checkpoint} is a checkpoint, but {run} has no config.yaml, which says what model it is of; put it back "
            "into RUN/checkpoints"
        )
    return run


def run_config(run: Path, words: tuple[str, ...] = ()) -> Config:
    return load_config(["--config", str(run / "config.yaml"), *words])


def tuned_config(run: Path, words: Sequence[str], fixed: Collection[str]) -> Config:
    """A finished run's configuration with options changed by `words`, but for the `fixed` ones.

    Raises:
        ValueError: the run has not finished, or a fixed option is another than the run's.
    """
    config = run_config(finished_run(run), tuple(words))
    changed = differences(with_absolute_paths(run_config(run)), with_absolute_paths(config))
    for option in fixed:
        if option in changed:
            before, now = changed[option]
            hint = f"; if that model has moved, write its new place into {run / 'config.yaml'}"
            raise ValueError(
                f"{option} is {now!r}, but the tuned model of {run} is of {before!r}; leave {option} out"
                + (hint if option == "model.name" else "")
            )
    return config


def _with_sampler(config: Config, device: str, sampler: dict[str, Any]) -> Config:
    """The configuration with fields of its sample section replaced, in fp32 on `device`.

    All of `compute` is the default: a run on a GPU may have trained by what `device` does not have. Frozen weights
    are in fp32 with it.
    """
    names = {"sampler": "scheduler"}
    for name, value in sampler.items():
        setattr(config.sample, names.get(name, name), value)
    config.run.device, config.compute, config.lora.base_precision = device, ComputeConfig(), "fp32"
    return config


def load_weights(policy: Policy, checkpoint: Path) -> None:
    """Put a checkpoint's weights into a policy, averaged ones if there are any; see `read_weights`."""
    trained = trained_weights(policy.network)
    weights = read_weights(checkpoint, {name: tuple(weight.shape) for name, weight in trained.items()})
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(weights[name])


def evaluate(run: Path, words: list[str], *, everything: bool = False) -> Path:
    """Evaluate a run's tuned model and its pretrained one on a fixed panel; prints a table, writes evaluation.json.

    With an evaluation.network, also the metrics of `evaluation.detail` against samples of the pretrained model's from
    the next seed.

    Args:
        words: options to change, such as evaluation.panel_size=512.
        everything: whether all metrics are printed, or the most useful ones.

    Raises:
        ValueError: see `tuned_config`.
    """
    config = tuned_config(run, words, (*BASE_MODEL, *ADAPTERS))
    device = choose_device(config.run.device)
    reward, panel = build_config_reward(config, device), build_panel(config, device, build_prompts(config)[0])
    result: dict[str, Any] = {
        name: asdict(getattr(config, name)) for name in ("sample", "reward", "prompts", "evaluation")
    }
    network, reference = panel.network, None
    before: Mapping[str, Tensor] = {}
    pretrained: Tensor | None = None
    if network is not None and panel.size < LEAST:
        print(f"evaluation.panel_size is {panel.size}: metrics of neighbours, which need {LEAST} images, are left out")
        network = None
    fidelity = importlib.util.find_spec("torchmetrics") is not None
    if network is not None and not fidelity:
        print('FID and KID are left out, since torchmetrics is not installed: pip install "hrf_fast[metrics]"')
    for title, name in (("pretrained", None), ("tuned", str(run / "model"))):
        policy = run_policy(run, config, name)
        metrics = panel.evaluate(policy, reward)
        result[title] = metrics.record()
        pretrained = metrics.images if pretrained is None else pretrained
        result[title]["peer"] = peer_columns(metrics.images, pretrained, panel.network, seed=panel.seed)
        if network is not None:
            if reference is None:
                reference, before = network.features(panel.with_next_seed().images(policy)), metrics.halves
            features = network.features(metrics.images)
            result[title]["detail"] = detail(features, metrics.images, reference, seed=panel.seed, fidelity=fidelity)
            if name is not None:
                result[title]["kept"] = {
                    metric: list(kept_interval(before[metric], values, metrics.samples[metric]))
                    for metric, values in metrics.halves.items()
                }
    write_atomically(run / "evaluation.json", json.dumps(result, indent=1).encode())
    print("\n".join(evaluation_lines(result, everything=everything)))
    return run / "evaluation.json"


def export(checkpoint: Path, out: Path, *, merge: bool = False) -> None:
    """Write a checkpoint as a diffusers folder, with averaged weights where the run averages.

    Args:
        merge: write a whole pipeline where a policy saves its adapters only.

    Raises:
        ValueError: not a checkpoint of a run, a folder that is there already, or nothing to merge.
    """
    run = _run_of(checkpoint)
    if run is None:
        raise ValueError(f"{checkpoint} is no checkpoint of a run; give RUN/checkpoints/iteration-…")
    if out.exists():
        raise ValueError(f"--out is {out}, which is there already; name a new folder")
    config = _with_sampler(run_config(run), "cpu", {})
    policy = run_policy(run, config)
    load_weights(policy, checkpoint)
    if merge:
        if not (policy.takes_prompts and config.lora.rank):
            raise ValueError(
                "--merge is for adapters of a text-to-image model; this checkpoint is written whole anyway"
            )
        policy.network.unet = merged(policy.network.unet)
    out.parent.mkdir(parents=True, exist_ok=True)
    iterations = json.loads((checkpoint / "state.json").read_text())["iteration"]
    save_model(out, policy, config, read_log(run / "evaluations.jsonl", PANEL), iterations)
