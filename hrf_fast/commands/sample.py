"""`hrf sample`: images of a model, a run or one of its checkpoints, as a grid or as a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hrf_fast.assembly.inputs import build_prompted_panel, build_prompts
from hrf_fast.commands.image_folder import check_folder, write_folder
from hrf_fast.commands.runs import checkpoint_policy, model_of_run, run_of, run_policy, with_sampler
from hrf_fast.config.options import FLOW_SAMPLERS, Config, ModelConfig, SampleConfig
from hrf_fast.devices import choose_device, set_up
from hrf_fast.evaluation.grids import check_picture, save_grid
from hrf_fast.evaluation.panel import Panel
from hrf_fast.policies.base import Policy
from hrf_fast.policies.load import load_policy
from hrf_fast.prompts import Prompt
from hrf_fast.prompts.draw import PromptList
from hrf_fast.prompts.sources import load_prompts
from hrf_fast.run.layout import RunFiles
from hrf_fast.training.calls import SAMPLED_TOGETHER


def draw(
    model: str,
    out: Path | None = None,
    *,
    folder: Path | None = None,
    count: int,
    images_per_call: int | None = None,
    seed: int,
    device: str,
    variant: str | None = None,
    prompts: Sequence[str] = (),
    prompts_file: str | None = None,
    negatives: Sequence[str] = (),
    deterministic_steps: int | None = None,
    **sampler: Any,
) -> str:
    """Write images of a model, a run or one of its checkpoints, as a grid or as a folder; returns a line about them.

    Args:
        out, folder: the picture of a grid, samples.png where neither is named; or a new folder, see `write_folder`.
        images_per_call: None for those of a run's panels, or 64; of a text-to-image model that is no run's as many as
            are decoded at once, since images of 1024 pixels by the dozen fit nowhere.
        variant: of the weight files of a model's folder or a hub id.
        prompts: of equally many images each, `count` at most; none for those of the run's panel.
        prompts_file: the prompts instead, as `load_prompts` takes them: all that have a weight above 0.
        negatives: one for all prompts, or one for each; of a file one for prompts that have none.
        deterministic_steps: None for those of a run's panels; 0, which is that of other models, draws with noise.
        sampler: scheduler, steps, eta and guidance; None for a run's own, or the options' defaults.

    Raises:
        ValueError: no such model, a run that is not finished, `out` is no name of a picture, `folder` is not empty, a
            count below 1, prompts that the model does not take, or an option of noise where images are drawn without.
    """
    if out is not None and folder is not None:
        raise ValueError(f"--out is {out} and --folder is {folder}; give one of them")
    out = out or Path("samples.png")
    if folder is not None:
        check_folder(folder)
    else:
        check_picture(out)
    for option, value in (("--count", count), ("--images-per-call", images_per_call)):
        if value is not None and value < 1:
            raise ValueError(f"{option} is {value}; it must be at least 1")
    asked = _asked(prompts, prompts_file, negatives, count)
    # the same seed draws the same images
    set_up(choose_device(device), deterministic=True)
    source = _source(model)
    sampler = {name: value for name, value in sampler.items() if value is not None}
    steps = _deterministic_steps(source, deterministic_steps, sampler)
    policy = _policy(source, device, variant, sampler, noisy=not steps)
    images_per_call = images_per_call or _most_in_a_call(source, policy)
    panel = Panel(count, seed, images_per_call, deterministic_steps=steps)
    panel = _prompted(panel, source, policy, asked, negatives)
    if folder is None:
        save_grid(panel.images(policy).cpu(), out, captions=panel.texts, images_per_prompt=panel.images_per_prompt)
    else:
        write_folder(folder, panel, policy)
    taken = f"{steps} deterministic steps" if steps else f"{len(policy.sampler)} steps"
    return f"{folder or out}: {panel.size} images of {model} in {taken}"


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
    return policy.decoded_at_once if policy.takes_prompts else SAMPLED_TOGETHER


def _source(name: str) -> _Source:
    path = Path(name).expanduser()
    run, model = (run, None) if (run := run_of(path)) else model_of_run(path) or (None, None)
    return _Source(name, run, RunFiles(run).read_config() if run else None, model)


def _asked(texts: Sequence[str], file: str | None, negatives: Sequence[str], count: int) -> tuple[Prompt, ...]:
    """The prompts of the command line or of a file; empty where neither is named.

    Raises:
        ValueError: both are named, a file that `load_prompts` refuses or a function of single prompts, more prompts
            than images, or another number of negative prompts.
    """
    if file is None:
        if len(negatives) > 1 and len(negatives) != len(texts):
            raise ValueError(
                f"--negative is given {len(negatives)} times and --prompt {len(texts)} times; give one negative prompt "
                "for all, or one for each"
            )
        each = negatives if len(negatives) == len(texts) else [*negatives, ""][:1] * len(texts)
        asked = tuple(Prompt(text, negative) for text, negative in zip(texts, each, strict=True))
        number = f"--prompt is given {len(asked)} times"
    else:
        if texts:
            raise ValueError(f"--prompts is {file} and --prompt {texts[0]!r}; give one of them")
        if len(negatives) > 1:
            raise ValueError(
                f"--negative is given {len(negatives)} times with --prompts {file}; give one, for prompts that have "
                "none, and write the others into the file"
            )
        source, _ = load_prompts("--prompts", file, negative="".join(negatives))
        if not isinstance(source, PromptList):
            raise ValueError(f"--prompts is {file}, a function of one prompt at a time; let it return a list")
        asked = tuple(source.fixed(0, len(source.prompts)))
        number = f"--prompts {file} has {len(asked)} prompts"
    if len(asked) > count:
        raise ValueError(f"{number} but --count is {count}; draw an image of each")
    return asked


def _prompted(
    panel: Panel, source: _Source, policy: Policy, asked: tuple[Prompt, ...], negatives: Sequence[str]
) -> Panel:
    """The panel with the prompts to draw: those asked for, else those of the run's own panel.

    Raises:
        ValueError: prompts for a model that takes none, or none for a model that is no run's.
    """
    if not policy.takes_prompts:
        if asked or negatives:
            raise ValueError(f"{source.name} takes no prompts; leave --prompt, --prompts and --negative out")
        return panel
    if negatives and not policy.has_unconditional_branch:
        raise ValueError(f"--negative is given, but {source.name} has no negative prompts; leave it out")
    if negatives and policy.guidance_scale == 1:
        raise ValueError("--negative is given, but acts through guidance, of which there is none; add --guidance 5")
    if asked:
        each_of = panel.size // len(asked)
        return replace(panel, size=each_of * len(asked), prompts=asked, images_per_prompt=each_of)
    if source.config is None:
        raise ValueError(f'{source.name} draws what a prompt says; give one or several, as --prompt "a cat"')
    of_run = build_prompted_panel(source.config, build_prompts(source.config)[0])
    shown = tuple(replace(prompt, negative=(*negatives, prompt.negative)[0]) for prompt in of_run.prompts)
    return replace(panel, prompts=shown, images_per_prompt=of_run.images_per_prompt)


def _policy(source: _Source, device: str, variant: str | None, sampler: dict[str, Any], *, noisy: bool) -> Policy:
    """The policy of a source; of a run under the sampler that it was trained with.

    Args:
        noisy: whether its own sampler draws.
    """
    if source.run is None or source.config is None:
        _check_noise(sampler, sampler.get("scheduler") or "ddim")
        model = ModelConfig(source.name, variant=variant)
        return load_policy(model, SampleConfig(**sampler), noisy=noisy, device=choose_device(device))
    _check_noise(sampler, sampler.get("scheduler") or source.config.sample.scheduler)
    if variant is not None:
        raise ValueError(
            f"--variant is {variant!r}, but {source.name} is of a run, whose weights have none; leave it out"
        )
    config = with_sampler(source.config, device, sampler)
    if source.model is None:
        return checkpoint_policy(source.run, config, Path(source.name).expanduser())
    return run_policy(source.run, config, str(source.model))


def _deterministic_steps(source: _Source, steps: int | None, sampler: Mapping[str, Any]) -> int:
    """Deterministic steps to draw by, those of a run's panels unless `steps` are asked for; 0 for none.

    Raises:
        ValueError: `steps` are below 0, or the sampler has an option that such steps do not follow.
    """
    if steps is not None and steps < 0:
        raise ValueError(f"--deterministic-steps is {steps}; it must be at least 0")
    of_run = source.config.evaluation.deterministic_steps if source.config else 0
    chosen = of_run if steps is None else steps
    for name in ("num_inference_steps", "scheduler", "eta", "noise_level"):
        if chosen and name in sampler:
            asks = f"--deterministic-steps is {chosen}" if steps else f"panels of the run are of {chosen} such steps"
            option = "--" + name.removeprefix("num_inference_").replace("_", "-")
            raise ValueError(
                f"{option} is {sampler[name]}, but images are drawn by deterministic steps ({asks}), which do not "
                f"follow it; leave it out, or draw with noise by --deterministic-steps 0"
            )
    return chosen


def _check_noise(sampler: Mapping[str, Any], kind: str) -> None:
    """Refuse the noise scale of another kind of sampler than `kind`."""
    wrong, right = ("eta", "noise_level") if kind in FLOW_SAMPLERS else ("noise_level", "eta")
    if wrong in sampler:
        raise ValueError(
            f"--{wrong.replace('_', '-')} is {sampler[wrong]:g}, but the sampler is {kind}, whose noise scale is "
            f"--{right.replace('_', '-')}; leave it out, or name another sampler by --scheduler"
        )
