"""`hrf sample`: a grid of images of a model, a run or one of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hrf_fast.assembly.inputs import build_prompted_panel, build_prompts
from hrf_fast.commands.runs import checkpoint_policy, model_of_run, run_of, run_policy, with_sampler
from hrf_fast.config.options import FLOW_SAMPLERS, Config
from hrf_fast.devices import choose_device, set_precision_flags
from hrf_fast.evaluation.grids import check_picture, save_grid
from hrf_fast.evaluation.panel import Panel
from hrf_fast.policies.base import Policy
from hrf_fast.policies.load import load_policy
from hrf_fast.policies.sample import sample
from hrf_fast.prompts import Prompt
from hrf_fast.run.layout import RunFiles
from hrf_fast.training.calls import SAMPLED_TOGETHER


def draw(
    model: str,
    out: Path,
    *,
    count: int,
    images_per_call: int | None = None,
    seed: int,
    device: str,
    variant: str | None = None,
    prompts: Sequence[str] = (),
    negatives: Sequence[str] = (),
    **sampler: Any,
) -> str:
    """Write a grid of images of a model, a run or one of its checkpoints; returns a line about it.

    Args:
        images_per_call: None for those of a run's panels, or 64; of a text-to-image model that is no run's as many as
            are decoded at once, since images of 1024 pixels by the dozen fit nowhere.
        variant: of the weight files of a model's folder or a hub id.
        prompts: of equally many images each, `count` at most; none for those of the run's panel.
        negatives: one for all prompts, or one for each.
        sampler: scheduler, steps, eta and guidance; None for a run's own, or the defaults of `load_policy`.

    Raises:
        ValueError: no such model, a run that is not finished, `out` is no name of a picture, a count below 1, or
            prompts that the model does not take.
    """
    for option, value in (("--count", count), ("--images-per-call", images_per_call)):
        if value is not None and value < 1:
            raise ValueError(f"{option} is {value}; it must be at least 1")
    # the same seed draws the same grid
    set_precision_flags(choose_device(device), deterministic=True)
    source = _source(model)
    policy = _policy(source, device, variant, {name: value for name, value in sampler.items() if value is not None})
    images_per_call = images_per_call or _most_in_a_call(source, policy)
    panel = _prompted(Panel(count, seed, images_per_call), source, policy, prompts, negatives)
    check_picture(out)
    each = [panel.prompt(image) for image in range(panel.size)]
    images = policy.decode(sample(policy, panel.noise(policy), each, images_per_call=images_per_call)).cpu()
    save_grid(images, out, captions=panel.texts, images_per_prompt=panel.images_per_prompt)
    return f"{out}: {panel.size} images of {model} in {len(policy.sampler)} steps"


@dataclass(frozen=True)
class _Source:
    """A model to draw of: one by name, or the model or a checkpoint of a run."""

    name: str
    run: Path | None
    config: Config | None
    """Configuration of the run."""
    model: Path | None
    """A folder; None for a checkpoint's."""


def _most_in_a_call(source: _Source, policy: Policy) -> int:
    if source.config is not None:
        return source.config.compute.images_per_call or SAMPLED_TOGETHER
    return getattr(policy, "decoded_at_once", 1) if policy.takes_prompts else SAMPLED_TOGETHER


def _source(name: str) -> _Source:
    path = Path(name).expanduser()
    run, model = (run, None) if (run := run_of(path)) else model_of_run(path) or (None, None)
    return _Source(name, run, RunFiles(run).read_config() if run else None, model)


def _prompted(panel: Panel, source: _Source, policy: Policy, prompts: Sequence[str], negatives: Sequence[str]) -> Panel:
    """The panel with the prompts to draw: those given, else those of the run's own panel.

    Raises:
        ValueError: prompts for a model that takes none, none for a model that is no run's, more prompts than images,
            or another number of negative prompts.
    """
    if not policy.takes_prompts:
        if prompts or negatives:
            raise ValueError(f"{'--prompt' if prompts else '--negative'} is given, but {source.name} takes no prompts")
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
        each_of = panel.size // len(asked)
        return replace(panel, size=each_of * len(asked), prompts=asked, images_per_prompt=each_of)
    if source.config is None:
        raise ValueError(f'{source.name} draws what a prompt says; give one or several, as --prompt "a cat"')
    of_run = build_prompted_panel(source.config, build_prompts(source.config)[0])
    asked = tuple(replace(prompt, negative=(*negatives, prompt.negative)[0]) for prompt in of_run.prompts)
    return replace(panel, prompts=asked, images_per_prompt=of_run.images_per_prompt)


def _policy(source: _Source, device: str, variant: str | None, sampler: dict[str, Any]) -> Policy:
    """The policy of a source; of a run under the sampler that it was trained with."""
    if source.run is None or source.config is None:
        _check_noise(sampler, sampler.get("scheduler") or "ddim")
        return load_policy(source.name, variant=variant, **sampler, device=choose_device(device))
    _check_noise(sampler, sampler.get("scheduler") or source.config.sample.scheduler)
    if variant is not None:
        raise ValueError(
            f"--variant is {variant!r}, but {source.name} is of a run, whose weights have none; leave it out"
        )
    config = with_sampler(source.config, device, sampler)
    if source.model is None:
        return checkpoint_policy(source.run, config, Path(source.name).expanduser())
    return run_policy(source.run, config, str(source.model))


def _check_noise(sampler: Mapping[str, Any], kind: str) -> None:
    """Refuse the noise scale of another kind of sampler than `kind`."""
    wrong, right = ("eta", "noise_level") if kind in FLOW_SAMPLERS else ("noise_level", "eta")
    if wrong in sampler:
        raise ValueError(
            f"--{wrong.replace('_', '-')} is {sampler[wrong]:g}, but the sampler is {kind}, whose noise scale is "
            f"--{right.replace('_', '-')}; leave it out, or name another sampler by --scheduler"
        )
