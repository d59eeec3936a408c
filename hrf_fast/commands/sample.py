"""`hrf sample`: a grid of images of a model, a run or one of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hrf_fast.assembly.inputs import build_prompted_panel, build_prompts
from hrf_fast.commands.runs import load_weights, model_of_run, run_config, run_of, run_policy, with_sampler
from hrf_fast.config.options import FLOW_SAMPLERS
from hrf_fast.devices import choose_device, set_precision_flags
from hrf_fast.evaluation.grids import save_grid
from hrf_fast.evaluation.panel import Panel
from hrf_fast.policies.base import Policy
from hrf_fast.policies.load import load_policy
from hrf_fast.policies.sample import sample
from hrf_fast.prompts import Prompt


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
) -> str:
    """Write a grid of images of a model, a run or one of its checkpoints; returns a line about it.

    Args:
        variant: of the weight files of a model's folder or a hub id.
        prompts: of equally many images each, `count` at most; none for those of the run's panel.
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
    each = [panel.prompt(image) for image in range(panel.size)]
    images = policy.decode(sample(policy, panel.noise(policy), each, images_per_call=images_per_call)).cpu()
    save_grid(images, out, captions=panel.texts, images_per_prompt=panel.images_per_prompt)
    return f"{out}: {panel.size} images of {model} in {len(policy.sampler)} steps"


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
        each_of = panel.size // len(asked)
        return replace(panel, size=each_of * len(asked), prompts=asked, images_per_prompt=each_of)
    path = Path(model).expanduser()
    run = run_of(path) or next(iter(model_of_run(path) or ()), None)
    if run is None:
        raise ValueError(f'{model} draws what a prompt says; give one or several, as --prompt "a cat"')
    config = run_config(run)
    of_run = build_prompted_panel(config, build_prompts(config)[0])
    asked = tuple(replace(prompt, negative=(*negatives, prompt.negative)[0]) for prompt in of_run.prompts)
    return replace(panel, prompts=asked, images_per_prompt=of_run.images_per_prompt)


def _policy(model: str, device: str, variant: str | None, sampler: dict[str, Any]) -> Policy:
    """A model by name, or a run's tuned model or checkpoint under the sampler that it was trained with."""
    path = Path(model).expanduser()
    run, of_run = run_of(path), None
    if run is None and (of_run := model_of_run(path)):
        run = of_run[0]
    config = run_config(run) if run else None
    _check_noise(sampler, sampler.get("sampler") or ("ddim" if config is None else config.sample.scheduler))
    if run is None or config is None:
        return load_policy(model, variant=variant, **sampler, device=choose_device(device))
    if variant is not None:
        raise ValueError(f"--variant is {variant!r}, but {model} is of a run, whose weights have none; leave it out")
    if of_run:
        return run_policy(run, with_sampler(config, device, sampler), str(of_run[1]))
    policy = run_policy(run, with_sampler(config, device, sampler))
    load_weights(policy, path)
    return policy


def _check_noise(sampler: Mapping[str, Any], kind: str) -> None:
    """Refuse the noise scale of another kind of sampler than `kind`."""
    wrong, right = ("eta", "noise_level") if kind in FLOW_SAMPLERS else ("noise_level", "eta")
    if wrong in sampler:
        raise ValueError(
            f"--{wrong.replace('_', '-')} is {sampler[wrong]:g}, but the sampler is {kind}, whose noise scale is "
            f"--{right.replace('_', '-')}; leave it out, or name another sampler by --scheduler"
        )
