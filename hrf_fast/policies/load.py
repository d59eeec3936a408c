"""Loading: a policy from a shipped name, a diffusers folder or a hub id.

Left out: text conditioning and latent decoders; a model that needs them is refused here, by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hrf_fast.assets import ASSETS, SHIPPED
from hrf_fast.hub import find_folder
from hrf_fast.policies.attention import set_attention
from hrf_fast.policies.pixel import Policy
from hrf_fast.policies.sampler import COMPATIBLE, build_diffusion


def load_policy(
    name: str,
    *,
    revision: str | None = None,
    sampler: str = "ddim",
    num_inference_steps: int = 40,
    eta: float = 1.0,
    precision: str = "fp32",
    kernels: str = "auto",
    attention: str = "sdpa",
    channels_last: bool = False,
    device: str | torch.device = "cpu",
) -> Policy:
    """Load an unconditional diffusers DDPM or DDIM model as a policy.

    Args:
        name: `fashion` or `portraits` (shipped), a local diffusers folder, or a hub id such as
            google/ddpm-celebahq-256; revision: of a hub id.
        sampler, num_inference_steps, eta: see `build_diffusion`.
        precision: fp32, or bf16 or fp16 for autocast with fp32 weights.
        kernels: see `choose_backend`; attention: see `set_attention`.
        channels_last: weights and inputs of the UNet in that memory format.

    Raises:
        ValueError: no such model, no UNet in it, or one that this trainer cannot drive.
    """
    import diffusers
    from diffusers.utils import logging

    unet_folder, _, scheduler_folder, scheduler_config = read_configs(name, revision)
    if (unet_folder / "diffusion_pytorch_model.safetensors").exists():
        kwargs: dict[str, Any] = {"use_safetensors": True}
    else:
        # a .bin file is read by diffusers with torch.load(weights_only=True): tensors only, no code
        kwargs = {"use_safetensors": False}
    verbosity = logging.get_verbosity()
    # diffusers suggests installing accelerate and safetensors variants; neither concerns the user of this call
    logging.set_verbosity_error()
    try:
        unet = diffusers.UNet2DModel.from_pretrained(unet_folder, low_cpu_mem_usage=False, **kwargs).to(device).float()
        scheduler = getattr(diffusers, scheduler_config["_class_name"]).from_pretrained(scheduler_folder)
    # diffusers checks no types: a wrong value in a config can raise nearly anything
    except Exception as error:
        raise ValueError(
            f"model.name is {name!r} but its weights and configs in {unet_folder} and {scheduler_folder} do not load: "
            f"{type(error).__name__}: {error}; save the model again with diffusers' save_pretrained"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if unet.config.out_channels != unet.config.in_channels:
        raise ValueError(
            f"model.name is {name!r}, whose UNet returns {unet.config.out_channels} channels for "
            f"{unet.config.in_channels}: a learned variance, which is not supported; use a model of fixed variance"
        )
    if unet.config.in_channels not in (1, 3) or unet.config.sample_size is None:
        raise ValueError(
            f"model.name is {name!r}, whose UNet takes {unet.config.in_channels} channels of size "
            f"{unet.config.sample_size}; a pixel-space model of 1 or 3 channels with a sample_size is needed"
        )
    size = unet.config.sample_size
    halvings = 2 ** (len(unet.config.block_out_channels) - 1)
    if any(side % halvings for side in ([size] if isinstance(size, int) else size)):
        raise ValueError(
            f"model.name is {name!r}, whose sample_size is {size}: its UNet halves the image "
            f"{len(unet.config.block_out_channels) - 1} times, so use a size divisible by {halvings}"
        )
    # a mapped file's weights lie anywhere, and some matrix products round by alignment
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone()
    set_attention(unet, attention)
    diffusion = build_diffusion(scheduler, sampler=sampler, num_inference_steps=num_inference_steps, eta=eta)
    # dropout would make the policy that samples another one than the policy that is scored
    return Policy(unet.eval(), scheduler, diffusion, precision=precision, kernels=kernels, channels_last=channels_last)


def read_configs(
    name: str, revision: str | None = None, *, weights: bool = True
) -> tuple[Path, dict[str, Any], Path, dict[str, Any]]:
    """Where a model's UNet is and its config, then the same of its scheduler; without `weights` no more is downloaded.

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
    unet_folder, unet_config = _component(folder, "unet", "config.json")
    scheduler_folder, scheduler_config = _component(folder, "scheduler", "scheduler_config.json")
    if unet_config.get("_class_name") != "UNet2DModel":
        raise ValueError(
            f"model.name is {name!r}, whose UNet is a {unet_config.get('_class_name')}; this trainer drives "
            "unconditional UNet2DModel pipelines (DDPM, DDIM), e.g. google/ddpm-celebahq-256"
        )
    for key in ("num_class_embeds", "class_embed_type"):
        if unet_config.get(key) is not None:
            raise ValueError(
                f"model.name is {name!r}, whose UNet is conditioned on a class ({key}: {unet_config[key]!r}), which is "
                "not supported; use an unconditional model"
            )
    if scheduler_config.get("_class_name") not in COMPATIBLE:
        raise ValueError(
            f"model.name is {name!r}, whose scheduler is {scheduler_config.get('_class_name')}; "
            f"use one of {', '.join(COMPATIBLE)}"
        )
    return unet_folder, unet_config, scheduler_folder, scheduler_config


def _component(folder: Path, name: str, config: str) -> tuple[Path, dict[str, Any]]:
    """A pipeline part and its config: in its own subfolder, or at the top as in older hub repositories."""
    for candidate in (folder / name, folder):
        if (candidate / config).is_file():
            try:
                values = json.loads((candidate / config).read_text())
            except ValueError as error:
                raise ValueError(f"model.name: {candidate / config} is not valid JSON ({error})") from error
            if not isinstance(values, dict):
                raise ValueError(
                    f"model.name: {candidate / config} holds a JSON {type(values).__name__}, not an object; "
                    "give the file that diffusers' save_pretrained writes"
                )
            return candidate, values
    raise ValueError(
        f"model.name is {str(folder)!r}, which holds no {name}/{config} (nor {config}); "
        "give a diffusers pipeline folder with unet/ and scheduler/"
    )
