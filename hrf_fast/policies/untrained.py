"""Untrained: what plans need of a model besides its weights, made from its configs alone."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from hrf_fast.config.options import SampleConfig
from hrf_fast.policies.base import Condition
from hrf_fast.policies.calling import FLUX, STABLE_DIFFUSION_3, Shape, shape_of
from hrf_fast.policies.component import Component
from hrf_fast.policies.encoders_t5 import LENGTH_FLUX, LENGTH_SD3
from hrf_fast.policies.files import ModelFiles
from hrf_fast.policies.flow_sampler import choose_sampler
from hrf_fast.policies.lora import store_frozen
from hrf_fast.policies.network import Network
from hrf_fast.policies.sampler import Sampler
from hrf_fast.policies.schedulers import make_scheduler


def untrained_network(files: ModelFiles, image_size: int | None = None) -> tuple[Network, tuple[int, ...]]:
    """The model's network in fp32 with random weights, and the shape of its latents at model.image_size."""
    shape = untrained_shape(files, image_size)
    return Network(_untrained(files.parts[files.denoiser]), "fp32", call=shape.call), shape.latents


def untrained_shape(files: ModelFiles, image_size: int | None = None) -> Shape:
    """See `shape_of`; from the configs alone."""
    vae = _configured(files.parts["vae"]) if "vae" in files.parts else None
    return shape_of(files.name, files.pipeline, _configured(files.parts[files.denoiser]), vae, image_size)


def untrained_condition(files: ModelFiles, images: int, guided: bool) -> Condition:
    """A condition of zeros in the shapes of the model's own; empty for an unconditional model."""
    if not files.takes_prompts:
        return Condition()
    encoders = [part.config for name, part in files.parts.items() if name.startswith("text_encoder")]
    length = encoders[0].get("max_position_embeddings", 77)
    transformer = files.parts["transformer"].config if "transformer" in files.parts else {}
    if files.pipeline == FLUX:
        rows = {
            "encoder_hidden_states": torch.zeros(images, LENGTH_FLUX, transformer.get("joint_attention_dim", 4096)),
            "pooled_projections": torch.zeros(images, transformer.get("pooled_projection_dim", 768)),
        }
        if transformer.get("guidance_embeds", False):
            rows["guidance"] = torch.zeros(images)
        return Condition(rows)
    if files.pipeline == STABLE_DIFFUSION_3:
        tokens = length + LENGTH_SD3
        rows = {
            "encoder_hidden_states": torch.zeros(images, tokens, transformer.get("joint_attention_dim", 4096)),
            "pooled_projections": torch.zeros(images, transformer.get("pooled_projection_dim", 2048)),
        }
        return Condition(rows, dict(rows) if guided else {})
    width = sum(config.get("hidden_size", 512) for config in encoders)
    rows = {"encoder_hidden_states": torch.zeros(images, length, width)}
    if len(encoders) > 1:
        rows["text_embeds"] = torch.zeros(images, encoders[-1].get("projection_dim", 512))
        rows["time_ids"] = torch.zeros(images, 6)
    return Condition(rows, dict(rows) if guided else {})


def frozen_bytes(files: ModelFiles) -> int:
    """Bytes in fp32 of the networks that run beside the denoiser: decoder and text encoders."""
    with torch.device("meta"):
        networks = [
            _untrained(part) for name, part in files.parts.items() if part.has_weights and name != files.denoiser
        ]
    return sum(4 * parameter.numel() for network in networks for parameter in network.parameters())


def copied_bytes(files: ModelFiles, precision: str) -> int:
    """Bytes of a frozen copy of the denoiser for a precision; see `DenoiserPolicy.hold_reference`."""
    with torch.device("meta"):
        unet = _untrained(files.parts[files.denoiser])
    store_frozen(unet.requires_grad_(False), precision)
    return sum(parameter.nbytes for parameter in unet.parameters())


def plan_sampler(files: ModelFiles, sample: SampleConfig, image_size: int | None = None) -> Sampler:
    """The sampler of a model at model.image_size, made from its configs alone; see `choose_sampler`."""
    scheduler = make_scheduler(
        f"model.name is {files.name!r}", files.parts["scheduler"].config, pipeline=files.pipeline
    )
    return choose_sampler(
        scheduler,
        kind=sample.scheduler,
        num_inference_steps=sample.num_inference_steps,
        eta=sample.eta,
        noise_level=sample.noise_level,
        image_tokens=untrained_shape(files, image_size).tokens,
        pipeline=files.pipeline,
    )


def _configured(part: Component) -> dict[str, Any]:
    """The config of a part of diffusers with its class's defaults filled in."""
    parameters = inspect.signature(getattr(importlib.import_module("diffusers"), part.kind).__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items()} | part.config


def _untrained(part: Component) -> torch.nn.Module:
    """A network of random weights, or of none on the meta device."""
    if not part.of_transformers:
        diffusers = importlib.import_module("diffusers")
        return getattr(diffusers, part.kind).from_config(part.config)  # type: ignore[no-any-return]
    transformers = importlib.import_module("transformers")
    kind = getattr(transformers, part.kind)
    return kind(kind.config_class(**part.config))  # type: ignore[no-any-return]
