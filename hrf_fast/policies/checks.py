"""Checks: what configs say of a model that the trainer can't drive exactly; each refusal names the setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# settings of a UNet2DModel by which something else than the step steers it
_CONDITIONED = ("num_class_embeds", "class_embed_type", "cross_attention_dim", "encoder_hid_dim", "addition_embed_type")
_BLOCKS = ("down_block_types", "mid_block_type", "up_block_types")


def check_unconditional(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a UNet2DModel that anything but the noisy image and a discrete step goes into.

    Args:
        name: model.name, for errors; config: of the UNet, as its file has it.
    """
    conditions = {key: config[key] for key in _CONDITIONED if config.get(key) is not None}
    blocks = {key: config[key] for key in _BLOCKS if "CrossAttn" in str(config.get(key))}
    for key, value in (conditions | blocks).items():
        raise ValueError(
            f"model.name is {name!r}, whose UNet is conditioned on a class or a text ({key}: {value!r}), which is "
            "not supported; use an unconditional model"
        )
    time = config.get("time_embedding_type", "positional")
    if time not in ("positional", "learned"):
        raise ValueError(
            f"model.name is {name!r}, whose UNet takes noise levels instead of steps (time_embedding_type: {time!r}) "
            "as score-based VE models do; use a model of DDPM's kind, whose time_embedding_type is positional"
        )


def check_unet(name: str, config: Any, scheduler: Any, *, latent: bool, is_flow: bool = False) -> None:
    """Refuse a UNet2DModel whose input, output or table of steps is not what the sampler needs.

    Args:
        config, scheduler: their configs with defaults filled in; latent: whether a decoder follows;
            is_flow: whether the timesteps are sigmas of flow matching.
    """
    if config.time_embedding_type == "learned" and config.num_train_timesteps < scheduler.num_train_timesteps:
        raise ValueError(
            f"model.name is {name!r}, whose UNet has learned {config.num_train_timesteps} steps but whose scheduler "
            f"has {scheduler.num_train_timesteps}; use the scheduler that the model was trained with"
        )
    if is_flow and config.time_embedding_type != "positional":
        raise ValueError(
            f"model.name is {name!r}, a flow-matching model whose UNet has time_embedding_type: "
            f"{config.time_embedding_type!r}, a table of whole steps; its sigmas need positional"
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
    check_size(name, config.sample_size, len(config.block_out_channels) - 1)


def check_size(name: str, size: Any, levels: int) -> None:
    """Refuse a UNet without a size of its latents, or one that it can't halve as often as it has levels."""
    sides = [size] if isinstance(size, int) else size
    if not sides:
        raise ValueError(
            f"model.name is {name!r}, whose UNet has no sample_size: that of its latents; add it to unet/config.json"
        )
    if any(side % 2**levels for side in sides):
        raise ValueError(
            f"model.name is {name!r}, whose sample_size is {size}: its UNet halves the image {levels} times, so use a "
            f"size divisible by {2**levels}"
        )
