"""Card: the README.md of a tuned model's folder, with the lines of diffusers that draw as the run's panels did.

Without them a user of the folder would get the pipeline's own number of steps and eta: another sampler. Where a flow's
panels have noise, which diffusers can't draw, the card says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hrf_fast.assets import SHIPPED
from hrf_fast.config.options import FLOW_SAMPLERS, Config, LoraConfig, RewardConfig, SampleConfig
from hrf_fast.hub import HUB_ID
from hrf_fast.policies.base import Policy
from hrf_fast.run.files import HELD_OUT, intervals_of, replace_folder
from hrf_fast.version import __version__

METHODS = {
    "full": "DDPO",
    "clusters": "HRF",
    "dynamic": "HRF-D",
    "mixgrpo": "MixGRPO",
    "flow_grpo_fast": "Flow-GRPO-Fast",
}
NAME = "README.md"
# the section of a flow-matching model whose panel has noise, which diffusers can't draw
_ODE = (
    "The panel samples with noise, by a rule that no scheduler of diffusers has (`stochastic_sampling` is another).",
    "These lines draw by the deterministic ODE of the same model, whose images get other rewards.",
)
_METRICS = {
    "reward": "reward",
    "vendi": "Vendi Score",
    "vendi_per_prompt": "Vendi Score per prompt",
    "looks": "effective number of looks",
    "inception": "Inception Score",
}


def reward_name(reward: RewardConfig) -> str:
    """The reward's name, or the weighted sum of its terms."""
    return reward.name or " + ".join(f"{term.weight:g} {term.name}" for term in reward.terms)


def save_model(
    folder: Path,
    policy: Policy,
    config: Config,
    panels: Sequence[dict[str, Any]],
    iterations: int,
    *,
    alpha: float | None = None,
) -> None:
    """Write a tuned model as a diffusers folder with its card, whole or not at all.

    Args:
        panels: the run's lines of evaluations.jsonl; iterations: done to the weights that the policy has.
        alpha: of a blend, see `hrf_fast.evaluation.blend`.
    """

    def fill(path: Path) -> None:
        policy.save(path)
        (path / NAME).write_text(model_card(policy, config, panels, iterations, alpha), encoding="utf-8")

    replace_folder(folder, fill)


def model_card(
    policy: Policy, config: Config, panels: Sequence[dict[str, Any]], iterations: int, alpha: float | None = None
) -> str:
    """README.md of a tuned model; arguments as `save_model`."""
    model, sample, evaluation = config.model, config.sample, config.evaluation
    local = model.name not in SHIPPED and os.path.isdir(model.name)
    base = _shown(model.name)
    details = ["a local folder"] if local else []
    details += [f"{name} {_shown(str(value))}" for name, value in vars(model).items() if name != "name" and value]
    detail = f" ({', '.join(details)})" if details else ""
    method = METHODS.get(config.window.schedule, config.window.schedule)
    flow, steps = sample.scheduler in FLOW_SAMPLERS, evaluation.deterministic_steps
    trained_by = f"{sample.scheduler}, {sample.num_inference_steps} steps, {_noise(sample)}"
    without_noise = f"{'the ODE' if flow else 'DDIM with eta 0'}, {steps} steps without noise"
    prompts = f", {evaluation.images_per_prompt} to a prompt" if policy.takes_prompts else ""
    lines = [
        "---",
        "library_name: diffusers",
        *([f"base_model: {base}"] if HUB_ID.fullmatch(base) else []),
        f"tags: [{'text-to-image' if policy.takes_prompts else 'unconditional-image-generation'}, "
        "reinforcement-learning, hrf_fast]",
        "---",
        "",
        f"# {Path(base).name} tuned by {method}",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {base}{detail} |",
        f"| method | {method} (`window.schedule={config.window.schedule}`), {iterations} iterations |",
        *([f"| sampler in training | {trained_by} |"] if steps else []),
        *_trained(config.lora),
        *([f"| blend | pretrained + {alpha:g} x (tuned - pretrained) |"] if alpha is not None else []),
        f"| reward | {reward_name(config.reward)} |",
        f"| trained by | hrf_fast {__version__} |",
        "",
        *_panel_table(panels, iterations),
        "",
        f"Panel: {evaluation.panel_size} images{prompts} from noise of seed {evaluation.seed}, "
        f"{without_noise if steps else trained_by}, {config.compute.precision}. "
        "Brackets are 95 % bootstrap intervals over its images.",
        "",
        *(["## Draw by the ODE", "", *_ODE] if flow and not steps else ["## Draw as the panel does"]),
        "",
        'In this folder; from elsewhere, put its path or hub id in place of `"."`:',
        "",
        "```python",
        _example(policy, config),
        "```",
        "",
        f"Another number of steps, another {'scheduler' if flow else 'eta or another scheduler'} is another sampler, "
        "whose images get other rewards;",
        "the pipeline's own defaults are one. The noise is PyTorch's here and not the panel's.",
        "",
    ]
    return "\n".join(lines)


def _noise(sample: SampleConfig) -> str:
    """The noise scale of the sampler, by its name."""
    if sample.scheduler not in FLOW_SAMPLERS:
        return f"eta {sample.eta:g}"
    level = FLOW_SAMPLERS[sample.scheduler] if sample.noise_level is None else sample.noise_level
    return f"noise level {level:g}"


def _trained(lora: LoraConfig) -> list[str]:
    """The row about adapters, where there are any."""
    if not lora.rank:
        return []
    alpha = lora.rank if lora.alpha is None else lora.alpha
    return [f"| trained | LoRA of rank {lora.rank}, alpha {alpha:g}, on {', '.join(lora.targets)} |"]


def _example(policy: Policy, config: Config) -> str:
    """The lines that draw; adapters are loaded into the model that was tuned."""
    model, sample = config.model, config.sample
    pinned = [f'{name}="{value}"' for name in ("revision", "variant") if (value := getattr(model, name))]
    shipped = f'ASSETS / "{model.name}" / "model"' if model.name in SHIPPED else ""
    base = shipped or ", ".join([f'"{_shown(model.name)}"', *pinned])
    scheduler, steps, eta = sample.scheduler, sample.num_inference_steps, sample.eta
    if config.evaluation.deterministic_steps:
        # of a flow, diffusers takes the ODE whatever the sampler
        scheduler, eta = scheduler if scheduler in FLOW_SAMPLERS else "ddim", 0.0
        steps = config.evaluation.deterministic_steps
    lines = policy.example(scheduler, steps, eta, base, negative=config.prompts.negative).strip()
    return f"from hrf_fast.assets import ASSETS\n{lines}" if shipped and shipped in lines else lines


def _shown(name: str) -> str:
    """A shipped name, a hub id, or the last part of a folder: where it lies is no one else's business."""
    return Path(name).name if name not in SHIPPED and os.path.isdir(name) else name


def _panel_table(panels: Sequence[dict[str, Any]], iterations: int) -> list[str]:
    """A table of the pretrained model's panel and of that after `iterations`, as far as they were evaluated."""
    by_iteration = {panel["iteration"]: panel for panel in panels}
    columns = {title: by_iteration[i] for title, i in (("pretrained", 0), ("tuned", iterations)) if i in by_iteration}
    if "tuned" not in columns:
        return [f"No panel was evaluated after iteration {iterations}; `hrf evaluate` does."]
    rows = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    measured = [intervals_of(panel) for panel in columns.values()]
    held_out = {
        name: f"held-out reward {name.removeprefix(HELD_OUT)}"
        for name in measured[-1]
        if name.startswith(HELD_OUT) and name in measured[0]
    }
    for key, title in (_METRICS | held_out).items():
        if key in measured[-1]:
            cells = ("{:#.4g} [{:#.4g}, {:#.4g}]".format(*intervals[key]) for intervals in measured)
            rows.append(f"| {title} | {' | '.join(cells)} |")
    return rows
