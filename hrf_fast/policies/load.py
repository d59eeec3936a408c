"""Load: a policy from a shipped name, a diffusers folder or a hub id.

The pipeline's class in model_index.json decides which policy it is; a class that has none is refused by name.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hrf_fast.assets import ASSETS, SHIPPED
from hrf_fast.hub import find_folder
from hrf_fast.policies.attention import set_attention
from hrf_fast.policies.base import Policy
from hrf_fast.policies.latent import LatentPolicy
from hrf_fast.policies.network import Network
from hrf_fast.policies.pixel import PixelPolicy
from hrf_fast.policies.sampler import COMPATIBLE, Sampler, build_sampler
from hrf_fast.policies.unconditional import latent_shape

PIXEL_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
LATENT_PIPELINES = ("LDMPipeline",)


@dataclass(frozen=True)
class Component:
    """A part of a pipeline: the folder that holds it, and its config."""

    folder: Path
    config: dict[str, Any]


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's parts lie; nothing is loaded yet."""

    name: str
    unet: Component
    scheduler: Component
    vqvae: Component | None
    """The decoder of a latent model; None for a pixel model."""


def load_policy(
    name: str,
    *,
    revision: str | None = None,
    sampler: str = "ddim",
    num_inference_steps: int = 40,
    eta: float = 1.0,
    precision: str = "fp32",
    attention: str = "sdpa",
    channels_last: bool = False,
    device: str | torch.device = "cpu",
) -> Policy:
    """Load an unconditional diffusers model (DDPM, DDIM or LDM) as a policy.

    Args:
        name: `fashion` or `portraits` (shipped), a local diffusers folder, or a hub id such as
            google/ddpm-celebahq-256; revision: of a hub id.
        sampler, num_inference_steps, eta: see `build_sampler`.
        precision, channels_last: see `UnconditionalPolicy`; attention: see `set_attention`.

    The environment variable HRF_KERNELS chooses what computes log-probs and their gradients, as `choose_backend` does:
    triton (fused), eager (plain torch), or auto.

    Raises:
        ValueError: no such model, no UNet in it, or one that this trainer cannot drive; or an HRF_KERNELS that can't
            run here.
    """
    files = read_model(name, revision)
    unet, scheduler, vqvae = _load_parts(files)
    _check_unet(name, unet.config, latent=vqvae is not None)
    unet = _aligned(unet.to(device).float())
    set_attention(unet, attention)
    kernels = os.environ.get("HRF_KERNELS") or "auto"
    steps = build_sampler(scheduler, kind=sampler, num_inference_steps=num_inference_steps, eta=eta)
    options: dict[str, Any] = {"precision": precision, "kernels": kernels, "channels_last": channels_last}
    # dropout would make the policy that samples another one than the policy that is trained
    unet = unet.eval()
    if vqvae is None:
        return PixelPolicy(unet, scheduler, steps, **options)
    return LatentPolicy(unet, scheduler, steps, _aligned(vqvae.to(device).float()), **options)


def untrained_network(files: ModelFiles) -> tuple[Network, tuple[int, int, int]]:
    """The model's network in fp32 with random weights, and the shape of its latents; for planning."""
    from diffusers import UNet2DModel

    return Network(UNet2DModel.from_config(files.unet.config), "fp32"), latent_shape(files.unet.config)


def _load_parts(files: ModelFiles) -> tuple[Any, Any, Any]:
    """The UNet, the scheduler and, of a latent model, the VQModel."""
    import diffusers
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    # diffusers suggests installing accelerate and safetensors variants; neither concerns the user of this call
    logging.set_verbosity_error()
    try:
        unet = _from_pretrained(diffusers.UNet2DModel, files.unet.folder)
        scheduler_class = getattr(diffusers, files.scheduler.config["_class_name"])
        scheduler = scheduler_class.from_pretrained(files.scheduler.folder)
        vqvae = _from_pretrained(diffusers.VQModel, files.vqvae.folder) if files.vqvae else None
    # diffusers checks no types: a wrong value in a config can raise nearly anything
    except Exception as error:
        folders = [part.folder for part in (files.unet, files.scheduler, files.vqvae) if part]
        raise ValueError(
            f"model.name is {files.name!r} but its weights and configs in {', '.join(map(str, folders))} do not load: "
            f"{type(error).__name__}: {error}; save the model again with diffusers' save_pretrained"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    return unet, scheduler, vqvae


def _from_pretrained(kind: Any, folder: Path) -> Any:
    # a .bin file is read by diffusers with torch.load(weights_only=True): tensors only, no code
    safe = (folder / "diffusion_pytorch_model.safetensors").exists()
    return kind.from_pretrained(folder, low_cpu_mem_usage=False, use_safetensors=safe)


def _aligned(module: Any) -> Any:
    """The module with its weights copied: a mapped file's lie anywhere, and some matrix products round by alignment."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


def _check_unet(name: str, config: Any, *, latent: bool) -> None:
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"model.name is {name!r}, whose UNet returns {config.out_channels} channels for {config.in_channels}: a "
            "learned variance, which is not supported; use a model of fixed variance"
        )
    if config.sample_size is None or (config.in_channels not in (1, 3) and not latent):
        raise ValueError(
            f"model.name is {name!r}, whose UNet takes {config.in_channels} channels of size {config.sample_size}; a "
            "pixel-space model of 1 or 3 channels with a sample_size is needed, or an LDMPipeline with its vqvae"
        )
    size, levels = config.sample_size, len(config.block_out_channels) - 1
    if any(side % 2**levels for side in ([size] if isinstance(size, int) else size)):
        raise ValueError(
            f"model.name is {name!r}, whose sample_size is {size}: its UNet halves the image {levels} times, so use a "
            f"size divisible by {2**levels}"
        )


def read_model(name: str, revision: str | None = None, *, weights: bool = True) -> ModelFiles:
    """Find a model's parts and read their configs; without `weights` nothing else is downloaded.

    Raises:
        ValueError: no such model, no UNet in it, or one of a kind that this trainer cannot drive.
    """
    folder = find_folder(
        "model.name",
        name,
        shipped={known: ASSETS / known / "model" for known in SHIPPED},
        revision=revision,
        weights=("*.safetensors", "*.bin") if weights else (),
    )
    latent = _pipeline(folder, name) in LATENT_PIPELINES
    unet = _component(folder, "unet", "config.json")
    scheduler = _component(folder, "scheduler", "scheduler_config.json")
    if unet.config.get("_class_name") != "UNet2DModel":
        raise ValueError(
            f"model.name is {name!r}, whose UNet is a {unet.config.get('_class_name')}; this trainer drives "
            "unconditional UNet2DModel pipelines (DDPM, DDIM, LDM), e.g. google/ddpm-celebahq-256"
        )
    for key in ("num_class_embeds", "class_embed_type"):
        if unet.config.get(key) is not None:
            raise ValueError(
                f"model.name is {name!r}, whose UNet is conditioned on a class ({key}: {unet.config[key]!r}), which is "
                "not supported; use an unconditional model"
            )
    if scheduler.config.get("_class_name") not in COMPATIBLE:
        raise ValueError(
            f"model.name is {name!r}, whose scheduler is {scheduler.config.get('_class_name')}; "
            f"use one of {', '.join(COMPATIBLE)}"
        )
    vqvae = _component(folder, "vqvae", "config.json") if latent else None
    if vqvae is not None and vqvae.config.get("_class_name") != "VQModel":
        raise ValueError(
            f"model.name is {name!r}, whose vqvae is a {vqvae.config.get('_class_name')}; an LDMPipeline has a VQModel"
        )
    return ModelFiles(name, unet, scheduler, vqvae)


def plan_sampler(files: ModelFiles, *, kind: str, num_inference_steps: int, eta: float) -> Sampler:
    """The sampler of a model, made from its scheduler's config alone; see `build_sampler`."""
    import diffusers

    scheduler = getattr(diffusers, files.scheduler.config["_class_name"]).from_config(files.scheduler.config)
    return build_sampler(scheduler, kind=kind, num_inference_steps=num_inference_steps, eta=eta)


def _pipeline(folder: Path, name: str) -> str:
    """The class that model_index.json names; a folder without the file is taken for a pixel model.

    Raises:
        ValueError: a class that no policy drives.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return PIXEL_PIPELINES[0]
    kind = _read_json(index).get("_class_name", PIXEL_PIPELINES[0])
    if kind not in (*PIXEL_PIPELINES, *LATENT_PIPELINES):
        raise ValueError(
            f"model.name is {name!r}, whose model_index.json says {kind}; there is a policy for "
            f"{', '.join((*PIXEL_PIPELINES, *LATENT_PIPELINES))} only"
        )
    return str(kind)


def _component(folder: Path, name: str, config: str) -> Component:
    """A pipeline part and its config: in its own subfolder, or at the top as in older hub repositories."""
    for candidate in (folder / name, folder):
        if (candidate / config).is_file():
            return Component(candidate, _read_json(candidate / config))
    raise ValueError(
        f"model.name is {str(folder)!r}, which holds no {name}/{config} (nor {config}); "
        "give a diffusers pipeline folder with unet/ and scheduler/"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"model.name: {path} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"model.name: {path} holds a JSON {type(values).__name__}, not an object; "
            "give the file that diffusers' save_pretrained writes"
        )
    return values
