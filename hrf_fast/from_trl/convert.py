"""TRL: a configuration of its removed DDPOTrainer (trl 0.23.1) as one of ours, for `hrf from-trl`.

The source is a JSON file of DDPOConfig fields, or a script, which is read and never run; fields given on the script's
command line go on top. What has no equal here is said in a note. docs/from_trl.md has the table in words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hrf_fast.from_trl.fields import COUNTS, DEFAULTS, HEAD, KNOWN, MOVED, PRECISIONS, SAME, SWITCHED_ON
from hrf_fast.from_trl.notes import NETWORK, UNNAMED, Numbers, write_notes
from hrf_fast.from_trl.source import TrlRun, read_source, read_words
from hrf_fast.registry import check_count, nearest


def convert(source: Path, words: Sequence[str] = (), *, processes: int | None = None) -> tuple[str, list[str]]:
    """Translate a TRL script or a JSON file of DDPOConfig fields.

    Args:
        words: `--field=value` as given to the script; processes: that TRL was launched on, None if that is not known.

    Returns:
        YAML for `hrf train --config`, with a comment where something is not as in TRL; and the texts of the comments.

    Raises:
        ValueError: no such file, not JSON, a script without a DDPOConfig, a field that DDPOConfig does not have, or no
            process.
    """
    if processes is not None:
        check_count("--processes", processes)
    run = read_source(source)
    switched_on = SWITCHED_ON | {name for name, value in run.fields.items() if value is True}
    for name, value in read_words(words, switched_on).items():
        run.set(name, value)
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
    return "\n".join(lines) + "\n", notes


def _check_type(name: str, value: Any) -> None:
    """Hold a field to the type of its default, and a count to 1 or more."""
    default = DEFAULTS[name]
    if default is None or isinstance(default, str):
        fits, wanted = value is default or isinstance(value, str), "a text"
    elif isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    else:
        kinds = int if isinstance(default, int) else (int, float)
        least = 1 if name in COUNTS else -math.inf
        fits = isinstance(value, kinds) and not isinstance(value, bool) and least <= value < math.inf
        wanted = "a whole number" if kinds is int else "a finite number"
        wanted += " of at least 1" if name in COUNTS else ""
    if not fits:
        raise ValueError(f"{name} is {value!r}, but DDPOConfig has {wanted}, such as {default!r}; correct it")


def translate(run: TrlRun, *, processes: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """The options, by "section.field", and the notes on what is not as in TRL.

    Raises:
        ValueError: a field that DDPOConfig does not have, or a value that it refuses.
    """
    for name in (*run.fields, *run.computed):
        if name not in KNOWN and name not in run.declared:
            raise ValueError(f"{name} is no field of DDPOConfig{nearest(name, KNOWN)}; correct or remove it")
    values = DEFAULTS | {name: value for name, value in run.fields.items() if name in DEFAULTS}
    if values["negative_prompts"] is None:
        # TRL's field is an Optional[str]
        values["negative_prompts"] = ""
    for name, value in values.items():
        _check_type(name, value)
    if values["mixed_precision"] not in PRECISIONS:
        raise ValueError(f"mixed_precision is {values['mixed_precision']!r}; DDPOConfig knows {', '.join(PRECISIONS)}")
    if not 0 < values["train_timestep_fraction"] <= 1:
        raise ValueError(
            f"train_timestep_fraction is {values['train_timestep_fraction']}; use a share above 0, at most 1"
        )
    steps, precision = values["sample_num_steps"], PRECISIONS[values["mixed_precision"]]
    samples = values["sample_batch_size"] * values["sample_num_batches_per_epoch"] * (processes or 1)
    per_step = values["train_batch_size"] * values["train_gradient_accumulation_steps"] * (processes or 1)
    tracked, guided = values["per_prompt_stat_tracking"], values["sample_guidance_scale"] > 1
    options = {option: values[name] for name, option in SAME.items()} | {
        "model.name": MOVED.get(values["pretrained_model"], values["pretrained_model"]),
        "sample.scheduler": "ddim",
        # up to 1 diffusers' pipelines do not guide
        "sample.guidance_scale": values["sample_guidance_scale"] if guided else 1.0,
        "train.guidance": values["train_cfg"] or not guided,
        "prompts.negative": values["negative_prompts"] if guided else "",
        "window.schedule": "full",
        "prompts.source": run.prompts or "animals",
        "reward.name": run.reward or UNNAMED,
        "train.group_size": 1,
        "train.groups_per_iteration": samples,
        "train.groups_per_step": per_step,
        "train.advantages": "prompt" if tracked else "batch",
        "train.scale_clips_by_window": False,
        "train.step_share": values["train_timestep_fraction"],
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
        "evaluation.network": NETWORK,
        "run.folder": f"runs/{run.name}",
    }
    if run.reward == "aesthetic" and HEAD.keys() & run.fields:
        options["reward.kwargs"] = {"head": ":".join(str(run.fields.get(name, HEAD[name])) for name in HEAD)}
    if tracked:
        options["train.prompt_buffer"] = values["per_prompt_stat_tracking_buffer_size"]
        options["train.prompt_min_count"] = values["per_prompt_stat_tracking_min_count"]
    if values["pretrained_revision"] != "main":
        options["model.revision"] = values["pretrained_revision"]
    if values["use_lora"]:
        options |= {"lora.rank": 4, "lora.alpha": 4, "lora.init": "gaussian", "lora.base_precision": precision}
    if values["log_with"]:
        options["run.writers"] = [values["log_with"]]
    options = dict(sorted(options.items()))
    return options, write_notes(run, values, options, Numbers(samples, per_step, processes))
