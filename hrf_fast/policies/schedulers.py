"""Schedulers: which of diffusers' schedulers say by their config what DDIM and DDPM steps of a model are.

A DDIM or DDPM scheduler stays as it is. Another one whose alphas mean the same becomes the DDIM of its config, as in
TRL: how it spaces its own noise levels (Karras sigmas and the like) belongs to its own steps. Flow matching has one
scheduler, whose sigmas are taken as they are (flow_sampler.py). Schedulers of EDM and of distilled models (LCM, TCD)
are refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hrf_fast.hub import first_line

# schedulers that the steps are made of directly
_EXACT = ("DDPMScheduler", "DDIMScheduler")
COMPATIBLE = (
    *_EXACT,
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# schedulers of distilled models, whose configs a DDIM reads
_DISTILLED = ("LCMScheduler", "TCDScheduler")
# settings that a DDIM takes over; diffusers drops those that are another class's defaults
_KEPT = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("set_alpha_to_one", "clip_sample"),
)
# settings that a policy has whatever the model's scheduler says or leaves out
_DECIDED = ("clip_sample", "set_alpha_to_one", "steps_offset")
# settings under which a compatible class drives models of another kind
_OTHER_KINDS = {"use_flow_sigmas": (None, False), "timestep_type": (None, "discrete")}


def check_scheduler(
    model: str, config: dict[str, Any], pipeline: str, *, ddpm: bool, flow_pipelines: Sequence[str]
) -> None:
    """Refuse a scheduler config whose alphas mean something else, or none that diffusers knows.

    Args:
        model: model.name, for errors; pipeline: class of the model's pipeline.
        ddpm: whether diffusers runs it with schedulers of DDPM's kind.
        flow_pipelines: all that diffusers runs with a scheduler of flow matching.

    Raises:
        ValueError: names the class or the setting.
    """
    kind = config.get("_class_name")
    if kind == FLOW_SCHEDULER:
        _check_flow(model, config, pipeline, flow_pipelines)
        return
    if not ddpm:
        raise ValueError(
            f"model.name is {model!r}, a {pipeline}, whose transformer is one of flow matching, but whose scheduler is "
            f"{kind}; use a {FLOW_SCHEDULER}"
        )
    if kind not in COMPATIBLE:
        known = ", ".join((*COMPATIBLE, FLOW_SCHEDULER))
        # the betas are those of DDPM, and the steps alone are others
        way_out = "; write DDIMScheduler as _class_name into its scheduler_config.json" if kind in _DISTILLED else ""
        raise ValueError(f"model.name is {model!r}, whose scheduler is {kind}; use one of {known}{way_out}")
    for setting, allowed in _OTHER_KINDS.items():
        if config.get(setting) not in allowed:
            raise ValueError(
                f"model.name is {model!r}, whose {kind} has {setting}: {config[setting]!r}, so that its timesteps are "
                "not those of DDPM; use a model of DDPM's kind"
            )


def _check_flow(model: str, config: dict[str, Any], pipeline: str, flow_pipelines: Sequence[str]) -> None:
    """Refuse a scheduler of flow matching in a pipeline that can't run it, or one whose sigmas rise."""
    if pipeline not in flow_pipelines:
        raise ValueError(
            f"model.name is {model!r}, a {pipeline} whose scheduler is {FLOW_SCHEDULER}, which diffusers can't run; "
            f"use a pipeline of flow matching: {', '.join(flow_pipelines)}"
        )
    if config.get("invert_sigmas", False):
        raise ValueError(
            f"model.name is {model!r}, whose scheduler has invert_sigmas: true, so that noise is at sigma 0; use a "
            "model without it"
        )


def make_scheduler(model: str, config: dict[str, Any], imposed: Mapping[str, Any], shift: float | None = None) -> Any:
    """The DDIM, DDPM or flow scheduler of a config that `check_scheduler` lets through, as its pipeline uses it.

    Args:
        model: the option that names the model, and its value, for errors.
        imposed: settings that the pipeline imposes: StableDiffusionPipeline sets steps_offset to 1 and never clips.
        shift: of a flow's sigmas, in place of the config's; see sample.shift.

    Raises:
        ValueError: a config that does not load, alphas that are not those of a DDIM of this config, or a shift of a
            model that is no flow.
    """
    if shift is not None:
        if config["_class_name"] != FLOW_SCHEDULER:
            raise ValueError(f"sample.shift is {shift:g}, but {model}, which is none of flow matching; leave it out")
        imposed = {**imposed, "shift": shift, "use_dynamic_shifting": False}
    scheduler = _from_config(model, config["_class_name"], config)
    if config["_class_name"] not in (*_EXACT, FLOW_SCHEDULER):
        settings = {"clip_sample": False} | {name: scheduler.config[name] for name in _KEPT if name in scheduler.config}
        ddim = _from_config(model, "DDIMScheduler", scheduler.config, **settings)
        # with zero terminal SNR some have 2**-24 where DDIM has 0
        if not torch.allclose(ddim.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-5, atol=1e-6):
            raise ValueError(
                f"{model}, whose {config['_class_name']} has other alphas than a DDIMScheduler of its config; save the "
                "model with a DDIMScheduler"
            )
        scheduler = ddim
    return type(scheduler).from_config(scheduler.config, **imposed) if imposed else scheduler


def not_defaults(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resolved config that `from_config` of a scheduler's class may not take from the model's own.

    These are the settings that `make_scheduler` decides, as far as they are not the class's default.
    """
    import diffusers

    defaults = inspect.signature(getattr(diffusers, kind)).parameters
    return {
        name: config[name]
        for name in _DECIDED
        if name in config and name in defaults and config[name] != defaults[name].default
    }


def _from_config(model: str, kind: str, config: Any, **changed: Any) -> Any:
    import diffusers

    try:
        return getattr(diffusers, kind).from_config(config, **changed)
    # diffusers checks no types: a wrong value in a config can raise nearly anything
    except Exception as error:
        raise ValueError(
            f"{model} but its scheduler_config.json does not load: {first_line(error)}; save the model again with "
            "diffusers' save_pretrained"
        ) from error
