"""Untrained: what plans need of a model besides its weights, made from its configs alone."""

from __future__ import annotations

import importlib

import torch

from hrf_fast.config.options import SampleConfig
from hrf_fast.policies.base import Condition
from hrf_fast.policies.component import Component
from hrf_fast.policies.files import ModelFiles
from hrf_fast.policies.flow_sampler import choose_sampler
from hrf_fast.policies.lora import store_frozen
from hrf_fast.policies.network import Network
from hrf_fast.policies.sampler import Sampler
from hrf_fast.policies.schedulers import make_scheduler
from hrf_fast.policies.unet import latent_shape


def untrained_network(files: ModelFiles) -> tuple[Network, tuple[int, int, int]]:
    """The model's network in fp32 with random weights, and the shape of its latents."""
    unet = _untrained(files.unet)
    return Network(unet, "fp32"), latent_shape(unet.config)


def untrained_condition(files: ModelFiles, images: int, guided: bool) -> Condition:
    """A condition of zeros in the shapes of the model's own; empty for an unconditional model."""
    if not files.takes_prompts:
        return Condition()
    encoders = [part.config for name, part in files.parts.items() if name.startswith("text_encoder")]
    length = encoders[0].get("max_position_embeddings", 77)
    width = sum(config.get("hidden_size", 512) for config in encoders)
    rows = {"encoder_hidden_states": torch.zeros(images, length, width)}
    if len(encoders) > 1:
        rows["text_embeds"] = torch.zeros(images, encoders[-1].get("projection_dim", 512))
        rows["time_ids"] = torch.zeros(images, 6)
    return Condition(rows, dict(rows) if guided else {})


def frozen_bytes(files: ModelFiles) -> int:
    """Bytes in fp32 of the networks that run beside the UNet: decoder and text encoders."""
    with torch.device("meta"):
        networks = [_untrained(part) for name, part in files.parts.items() if part.has_weights and name != "unet"]
    return sum(4 * parameter.numel() for network in networks for parameter in network.parameters())


def copied_bytes(files: ModelFiles, precision: str) -> int:
    """Bytes of a frozen copy of the UNet for a precision; see `UNetPolicy.hold_reference`."""
    with torch.device("meta"):
        unet = _untrained(files.unet)
    store_frozen(unet.requires_grad_(False), precision)
    return sum(parameter.nbytes for parameter in unet.parameters())


def plan_sampler(files: ModelFiles, sample: SampleConfig) -> Sampler:
    """The sampler of a model, made from its scheduler's config alone; see `choose_sampler`."""
    scheduler = make_scheduler(
        f"model.name is {files.name!r}", files.parts["scheduler"].config, pipeline=files.pipeline
    )
    return choose_sampler(
        scheduler,
        kind=sample.scheduler,
        num_inference_steps=sample.num_inference_steps,
        eta=sample.eta,
        noise_level=sample.noise_level,
    )


def _untrained(part: Component) -> torch.nn.Module:
    """A network of random weights, or of none on the meta device."""
    if not part.of_transformers:
        diffusers = importlib.import_module("diffusers")
        return getattr(diffusers, part.kind).from_config(part.config)  # type: ignore[no-any-return]
    transformers = importlib.import_module("transformers")
    return getattr(transformers, part.kind)(transformers.CLIPTextConfig(**part.config))  # type: ignore[no-any-return]
