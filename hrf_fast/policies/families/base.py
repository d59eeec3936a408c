"""Family: what tells one kind of model from another; everything else of the package treats all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hrf_fast.policies.base import Condition
from hrf_fast.policies.calling import Layout
from hrf_fast.policies.encoders import PromptEncoder

PartConfig = Mapping[str, Any]
PartConfigs = Mapping[str, PartConfig]
"""Configs of a pipeline's parts by name, as their files have them."""


def nothing_steers(configs: PartConfigs, images: int, guided: bool, t5_length: int) -> Condition:
    """The empty condition of an unconditional model."""
    return Condition()


def any_guidance(name: str, denoiser: PartConfig, guidance_scale: float) -> None:
    """Let every guidance scale through."""


def no_settings(index: PartConfig) -> dict[str, Any]:
    """No arguments besides the parts."""
    return {}


@dataclass(frozen=True)
class Family:
    """A kind of model, by the class of its pipeline in diffusers."""

    parts: Mapping[str, str]
    """The parts of the pipeline by name, and the class that a part's config must say it is; "" for any scheduler."""
    layout: Layout
    """How the denoiser is called, and what its latents are."""
    policy: type[Any]
    """The class that drives it, a DenoiserPolicy. Of an unconditional model it takes the decoders among the parts."""
    check: Callable[[str, PartConfigs], None]
    """Refuse configs that the trainer can't drive exactly, with model.name for errors."""
    encoder: type[PromptEncoder] | None = None
    """The class of the prompt encoder; None for an unconditional model."""
    zeros: Callable[[PartConfigs, int, bool, int], Condition] = nothing_steers
    """(configs, images, guided, tokens of T5) -> a condition of zeros in the shapes of the model's own, for plans."""
    t5_length: int = 0
    """Tokens of T5 for a prompt, as the pipeline has them by default (max_sequence_length); 0 without T5."""
    check_guidance: Callable[[str, PartConfig, float], None] = any_guidance
    """Refuse a guidance scale that the denoiser of a config does not take, with model.name for errors."""
    settings: Callable[[PartConfig], dict[str, Any]] = no_settings
    """model_index.json -> arguments of the pipeline's class besides its parts."""
    ddpm: bool = True
    """Whether diffusers runs the pipeline with schedulers of DDPM's kind."""
    flow: bool = False
    """Whether diffusers runs the pipeline with a scheduler of flow matching."""
    linear_sigmas: bool = False
    """Whether the pipeline gives a scheduler of flow matching linspace(1, 1/T, T) to shift."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the pipeline imposes on its scheduler."""
