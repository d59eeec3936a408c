"""Load: a policy from a shipped name, a diffusers folder or a hub id. Weights that don't fit are refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hrf_fast.hub import first_line
from hrf_fast.policies.attention import set_attention
from hrf_fast.policies.base import Policy
from hrf_fast.policies.files import Component, ModelFiles, read_model, shards_of
from hrf_fast.policies.latent import LatentPolicy
from hrf_fast.policies.network import Network
from hrf_fast.policies.pixel import PixelPolicy
from hrf_fast.policies.sampler import Sampler, build_sampler
from hrf_fast.policies.unconditional import latent_shape
from hrf_fast.weights import describe, not_finite


def load_policy(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
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
        variant: of the weight files, such as fp16; None for the plain ones.
        sampler, num_inference_steps, eta: see `build_sampler`.
        precision, channels_last: see `UnconditionalPolicy`; attention: see `set_attention`.

    The environment variable HRF_KERNELS chooses what computes log-probs and their gradients, as `choose_backend` does:
    triton (fused), eager (plain torch), or auto.

    Raises:
        ValueError: no such model, no UNet in it, one that this trainer cannot drive, or weights that are not those of
            its config or not finite; or an HRF_KERNELS that can't run here.
    """
    files = read_model(name, revision, variant)
    unet, scheduler, vqvae = _load_parts(files)
    _check_unet(name, unet.config, scheduler.config, latent=vqvae is not None)
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

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # diffusers suggests installing accelerate and safetensors variants; neither concerns the user of this call
    logging.set_verbosity_error()
    # of shards, among the JSON lines of a run
    logging.disable_progress_bar()
    try:
        unet = _load_module(files.name, diffusers.UNet2DModel, files.unet)
        scheduler_class = getattr(diffusers, files.scheduler.config["_class_name"])
        scheduler = _from_pretrained(files.name, scheduler_class, files.scheduler)
        vqvae = _load_module(files.name, diffusers.VQModel, files.vqvae) if files.vqvae else None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    return unet, scheduler, vqvae


def _load_module(name: str, kind: Any, part: Component) -> Any:
    """A network with all of its weights.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or not finite: diffusers leaves the memory of
            missing ones as it is.
    """
    module, report = _from_pretrained(
        name,
        kind,
        part,
        variant=part.variant,
        # a .bin file is read by diffusers with torch.load(weights_only=True): tensors only, no code
        use_safetensors=any(file.endswith(".safetensors") for file in part.weights),
        low_cpu_mem_usage=False,
        # to be told all of them at once
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    problem = (
        describe(report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])
        or _shard_problem(part)
        or not_finite(module.state_dict())
    )
    if problem:
        raise ValueError(
            f"model.name is {name!r}, whose weights in {part.folder} can't be used: {problem}; give the config.json "
            "and the weights of one model, as diffusers' save_pretrained writes them"
        )
    return module


def _from_pretrained(name: str, kind: Any, part: Component, **options: Any) -> Any:
    try:
        return kind.from_pretrained(part.folder, **options)
    # diffusers checks no types: a wrong value in a config can raise nearly anything
    except Exception as error:
        raise ValueError(
            f"model.name is {name!r} but its weights and config in {part.folder} do not load: {first_line(error)}; "
            "save the model again with diffusers' save_pretrained"
        ) from error


def _shard_problem(part: Component) -> str:
    """The tensors that an index promises and its shards lack, or the reverse; diffusers believes the index."""
    index, *shards = part.weights
    if not shards:
        return ""
    promised, held = shards_of(part.folder / index).keys(), set[str]()
    for shard in shards:
        held |= _names(part.folder / shard)
    return describe(promised - held, held - promised, [])


def _names(shard: Path) -> set[str]:
    if shard.suffix == ".safetensors":
        with safe_open(shard, framework="pt") as file:
            return set(file.keys())
    return set(torch.load(shard, map_location="cpu", weights_only=True))


def _aligned(module: Any) -> Any:
    """The module with its weights copied: a mapped file's lie anywhere, and some matrix products round by alignment."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


def _check_unet(name: str, config: Any, scheduler: Any, *, latent: bool) -> None:
    """Refuse a UNet whose input, output or table of steps is not what the sampler needs."""
    if config.time_embedding_type == "learned" and config.num_train_timesteps < scheduler.num_train_timesteps:
        raise ValueError(
            f"model.name is {name!r}, whose UNet has learned {config.num_train_timesteps} steps but whose scheduler "
            f"has {scheduler.num_train_timesteps}; use the scheduler that the model was trained with"
        )
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


def plan_sampler(files: ModelFiles, *, kind: str, num_inference_steps: int, eta: float) -> Sampler:
    """The sampler of a model, made from its scheduler's config alone; see `build_sampler`."""
    import diffusers

    scheduler = getattr(diffusers, files.scheduler.config["_class_name"]).from_config(files.scheduler.config)
    return build_sampler(scheduler, kind=kind, num_inference_steps=num_inference_steps, eta=eta)
