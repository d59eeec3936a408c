"""Untrained: what plans need of a model besides its weights, made from its configs alone."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from hrf_fast.config.options import SampleConfig
from hrf_fast.policies.base import Condition
from hrf_fast.policies.calling import Shape, shape_of
from hrf_fast.policies.component import Component
from hrf_fast.policies.files import ModelFiles
from hrf_fast.policies.flow_sampler import choose_sampler
from hrf_fast.policies.latent import DECODED_AT_ONCE
from hrf_fast.policies.lora import store_frozen
from hrf_fast.policies.network import DTYPES, Network
from hrf_fast.policies.sampler import Sampler
from hrf_fast.policies.schedulers import make_scheduler
from hrf_fast.policies.text_to_image import decoded_at_once

DECODERS = ("vae", "vqvae")
"""Names of the part that makes images of latents."""


def untrained_network(files: ModelFiles, image_size: int | None = None) -> tuple[Network, tuple[int, ...]]:
    """The model's network in fp32 with random weights, and the shape of its latents at model.image_size."""
    shape = untrained_shape(files, image_size)
    return Network(_untrained(files.parts[files.denoiser]), "fp32", call=shape.call), shape.latents


def untrained_shape(files: ModelFiles, image_size: int | None = None) -> Shape:
    """See `shape_of`; from the configs alone."""
    vae = _configured(files.parts["vae"]) if "vae" in files.parts else None
    return shape_of(files.name, files.family.layout, _configured(files.parts[files.denoiser]), vae, image_size)


def untrained_condition(files: ModelFiles, images: int, guided: bool) -> Condition:
    """A condition of zeros in the shapes of the model's own; empty for an unconditional model."""
    configs = {name: part.config for name, part in files.parts.items()}
    return files.family.zeros(configs, images, guided, files.t5_length)


def frozen_bytes(
    files: ModelFiles, encoder_precision: str = "fp32", decoder: Component | None = None
) -> dict[str, int]:
    """Bytes of the networks that run beside the denoiser, by name: the decoder in fp32, and text encoders.

    Args:
        decoder: of model.decoder, in place of the VAE, which stays on the CPU then.
    """
    parts = files.parts if decoder is None else {**files.parts, "vae": decoder}
    with torch.device("meta"):
        networks = {
            name: _untrained(part) for name, part in parts.items() if part.has_weights and name != files.denoiser
        }
    each = {name: 4 if name in DECODERS else DTYPES[encoder_precision].itemsize for name in networks}
    return {name: each[name] * sum(p.numel() for p in network.parameters()) for name, network in networks.items()}


def untrained_decoder(
    files: ModelFiles, image_size: int | None = None, decoder: Component | None = None
) -> tuple[Any, tuple[int, ...]] | None:
    """The decoder, with random weights, and the shape of the latents that one call of it takes; None in pixels.

    Args:
        decoder: of model.decoder, in place of the VAE.
    """
    if (name := next((name for name in DECODERS if name in files.parts), None)) is None:
        return None
    part, shape = files.parts[name], untrained_shape(files, image_size)
    if shape.size is None:
        return _untrained(part), (DECODED_AT_ONCE, *shape.latents)
    config = _configured(part)
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    sides = [side // factor for side in shape.size]
    return _untrained(decoder or part), (decoded_at_once(shape.size), config["latent_channels"], *sides)


def copied_bytes(files: ModelFiles, precision: str) -> int:
    """Bytes of a frozen copy of the denoiser for a precision; see `DenoiserPolicy.hold_reference`."""
    with torch.device("meta"):
        unet = _untrained(files.parts[files.denoiser])
    store_frozen(unet.requires_grad_(False), precision)
    return sum(parameter.nbytes for parameter in unet.parameters())


def plan_sampler(files: ModelFiles, sample: SampleConfig, image_size: int | None = None) -> Sampler:
    """The sampler of a model at model.image_size, made from its configs alone; see `choose_sampler`."""
    config, imposed = files.parts["scheduler"].config, files.family.scheduler
    scheduler = make_scheduler(f"model.name is {files.name!r}", config, imposed, sample.shift)
    tokens = untrained_shape(files, image_size).tokens
    return choose_sampler(scheduler, sample, image_tokens=tokens, linear_sigmas=files.family.linear_sigmas)


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
