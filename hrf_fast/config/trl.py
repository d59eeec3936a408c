"""TRL: a configuration of its removed DDPOTrainer (trl 0.23.1) as one of ours, for `hrf from-trl`.

The source is a JSON file of DDPOConfig fields, or a script, which is read and never run; fields given on the script's
command line go on top. What has no equal here is said in a note. docs/from_trl.md has the table in words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hrf_fast.config.trl_source import TrlRun, read_source, read_words
from hrf_fast.registry import nearest

# those that become options or notes, and their defaults; the others only concern where TRL logs
DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "log_with": None,
    "num_epochs": 100,
    "save_freq": 1,
    "num_checkpoint_limit": 5,
    "mixed_precision": "fp16",
    "allow_tf32": True,
    "resume_from": "",
    "sample_num_steps": 50,
    "sample_eta": 1.0,
    "sample_guidance_scale": 5.0,
    "sample_batch_size": 1,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 1,
    "train_use_8bit_adam": False,
    "train_learning_rate": 3e-4,
    "train_adam_beta1": 0.9,
    "train_adam_beta2": 0.999,
    "train_adam_weight_decay": 1e-4,
    "train_adam_epsilon": 1e-8,
    "train_gradient_accumulation_steps": 1,
    "train_max_grad_norm": 1.0,
    "train_num_inner_epochs": 1,
    "train_cfg": True,
    "train_adv_clip_max": 5.0,
    "train_clip_range": 1e-4,
    "train_timestep_fraction": 1.0,
    "per_prompt_stat_tracking": False,
    "per_prompt_stat_tracking_buffer_size": 16,
    "per_prompt_stat_tracking_min_count": 16,
    "negative_prompts": "",
    "push_to_hub": False,
    # of DefaultDDPOStableDiffusionPipeline and of TRL's example script
    "pretrained_model": "runwayml/stable-diffusion-v1-5",
    "pretrained_revision": "main",
    "use_lora": True,
}
# where TRL logs and how its trackers are called: run.folder, run.writers and run.progress say it here
IGNORED = (
    *("exp_name", "run_name", "tracker_kwargs", "accelerator_kwargs", "project_kwargs", "tracker_project_name"),
    *("logdir", "async_reward_computation", "max_workers", "hf_hub_model_id"),
    *("hf_hub_aesthetic_model_id", "hf_hub_aesthetic_model_filename"),
)
SAME = {
    "seed": "run.seed",
    "num_epochs": "train.iterations",
    "save_freq": "run.save_every",
    "num_checkpoint_limit": "run.keep_checkpoints",
    "sample_num_steps": "sample.num_inference_steps",
    "sample_eta": "sample.eta",
    "sample_guidance_scale": "sample.guidance_scale",
    "train_learning_rate": "optimizer.learning_rate",
    "train_adam_weight_decay": "optimizer.weight_decay",
    "train_num_inner_epochs": "train.inner_epochs",
    "train_adv_clip_max": "train.advantage_clip",
    "train_clip_range": "train.clip_range",
    "train_cfg": "train.guidance",
    "negative_prompts": "prompts.negative",
    "pretrained_model": "model.name",
}
"""The option that takes a field's value as it is."""
PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}


def convert(source: Path, words: Sequence[str] = (), *, processes: int = 1) -> str:
    """Translate a TRL script or a JSON file of DDPOConfig fields.

    Args:
        words: `--field=value` as given to the script; processes: that TRL was launched on.

    Returns:
        YAML for `hrf train --config`, with a comment where something is not as in TRL.

    Raises:
        ValueError: no such file, not JSON, a script without a DDPOConfig, or a field that DDPOConfig does not have.
    """
    run = read_source(source)
    run.fields |= read_words(words)
    options, notes = translate(run, processes=processes)
    lines = [f"# {source.name} of TRL's DDPOTrainer as a configuration of hrf_fast; docs/from_trl.md explains it"]
    lines += [f"# - {note}" for note in notes]
    sections: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    for section, values in sections.items():
        lines.append(f"{section}:")
        # JSON is YAML, and 1e-05 is a number to OmegaConf
        lines += [f"  {key}: {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def translate(run: TrlRun, *, processes: int = 1) -> tuple[dict[str, Any], list[str]]:
    """The options, by "section.field", and the notes on what is not as in TRL.

    Raises:
        ValueError: a field that DDPOConfig does not have, or a value that it refuses.
    """
    for name in run.fields:
        if name not in DEFAULTS and name not in IGNORED:
            raise ValueError(f"{name} is no field of DDPOConfig{nearest(name, DEFAULTS)}; correct or remove it")
    values = DEFAULTS | {name: value for name, value in run.fields.items() if name in DEFAULTS}
    if values["mixed_precision"] not in PRECISIONS:
        raise ValueError(f"mixed_precision is {values['mixed_precision']!r}; DDPOConfig knows {', '.join(PRECISIONS)}")
    steps, precision = values["sample_num_steps"], PRECISIONS[values["mixed_precision"]]
    samples = values["sample_batch_size"] * values["sample_num_batches_per_epoch"] * processes
    per_step = values["train_batch_size"] * values["train_gradient_accumulation_steps"] * processes
    tracked = values["per_prompt_stat_tracking"]
    options = {option: values[name] for name, option in SAME.items()} | {
        "sample.scheduler": "ddim",
        "window.schedule": "full",
        "prompts.source": run.prompts or "animals",
        "reward.name": run.reward or "aesthetic",
        "train.group_size": 1,
        "train.groups_per_iteration": samples,
        "train.groups_per_step": per_step,
        "train.advantages": "prompt" if tracked else "batch",
        "train.scale_clips_by_window": False,
        "optimizer.name": "adamw_8bit" if values["train_use_8bit_adam"] else "adamw",
        # TRL's loss is the mean over steps, ours the sum: its gradients are smaller by the number of steps
        "optimizer.max_grad_norm": values["train_max_grad_norm"] * steps,
        "optimizer.kwargs": {
            "betas": [values["train_adam_beta1"], values["train_adam_beta2"]],
            "eps": values["train_adam_epsilon"] * steps,
        },
        "compute.precision": precision,
        "compute.images_per_call": values["train_batch_size"],
        "compute.deterministic": not values["allow_tf32"],
    }
    if tracked:
        options["train.prompt_buffer"] = values["per_prompt_stat_tracking_buffer_size"]
        options["train.prompt_min_count"] = values["per_prompt_stat_tracking_min_count"]
    if values["pretrained_revision"] != "main":
        options["model.revision"] = values["pretrained_revision"]
    if values["use_lora"]:
        options |= {"lora.rank": 4, "lora.alpha": 4, "lora.init": "gaussian", "lora.base_precision": precision}
    if values["log_with"]:
        options["run.writers"] = [values["log_with"]]
    return dict(sorted(options.items())), _notes(run, values, samples, per_step)


def _notes(run: TrlRun, values: Mapping[str, Any], samples: int, per_step: int) -> list[str]:
    notes = [
        f"{name} is {expression} in the script, which was not run; check it"
        for name, expression in run.computed.items()
        if name in DEFAULTS
    ]
    if run.prompts is None:
        notes.append("prompts.source: TRL's prompt_fn could not be named; animals is the list of TRL's example")
    if run.reward is None:
        notes.append("reward.name: TRL's reward function could not be named; put it into a module as module:function")
    if values["train_timestep_fraction"] != 1:
        notes.append(
            f"train_timestep_fraction {values['train_timestep_fraction']}: TRL trains a random share of each sample's "
            "steps; here all steps of a window are trained, and window.schedule=clusters (HRF) trains fewer"
        )
    if not values["train_cfg"] and values["sample_guidance_scale"] > 1:
        notes.append(
            "train_cfg false: TRL samples with guidance and trains without, so its ratio is not 1 on policy; "
            "train.guidance=false leaves guidance out of both, and panels keep it"
        )
    if samples % per_step:
        notes.append(
            f"{samples} samples an epoch are no multiple of {per_step} per optimizer step, which TRL refuses as "
            "hrf_fast does: change train.groups_per_step"
        )
    if values["resume_from"]:
        notes.append("resume_from: the same `hrf train` command resumes its own run; TRL's checkpoints can't be read")
    if values["push_to_hub"]:
        notes.append("push_to_hub: upload the run's model/ folder, which has a card, with huggingface-cli")
    return notes
