"""Checks that several families have: what configs say that the trainer can't drive, each refused by name."""

from __future__ import annotations

from typing import Any

from hrf_fast.policies.families.base import PartConfig, PartConfigs


def check_size(name: str, size: Any, unet: PartConfig) -> None:
    """Refuse a UNet without a size of its latents, or one that it can't halve as often as it has levels."""
    sides, blocks = [size] if isinstance(size, int) else size, unet.get("block_out_channels", (0,) * 4)
    if not sides:
        raise ValueError(
            f"model.name is {name!r}, whose UNet has no sample_size: that of its latents; add it to unet/config.json"
        )
    # diffusers refuses blocks of another type
    levels = len(blocks) - 1 if isinstance(blocks, list | tuple) else 0
    if any(side % 2**levels for side in sides):
        raise ValueError(
            f"model.name is {name!r}, whose sample_size is {size}: its UNet halves the image {levels} times, so use a "
            f"size divisible by {2**levels}"
        )


def check_transformer(
    name: str, configs: PartConfigs, *, channels: int, patch: int, pooled: str, pooled_width: int
) -> list[PartConfig]:
    """Refuse a transformer whose inputs are not what the VAE and the text encoders make.

    Args:
        name: model.name, for errors; configs: of its parts by name, as their files have them.
        channels, pooled_width: in_channels and pooled_projection_dim that the transformer's class has by default.
        patch: latents in a row of its input.
        pooled: the setting of a CLIP that says how wide its pooled embedding is.

    Returns:
        The configs of its CLIPs.
    """
    transformer, start = configs["transformer"], f"model.name is {name!r}, whose transformer "
    channels = transformer.get("in_channels", channels)
    returned = transformer.get("out_channels") or channels
    if returned != channels:
        raise ValueError(
            f"{start}takes {channels} channels and returns {returned}: one for inpainting or editing, whose pictures "
            "to begin with nobody draws here; use a text-to-image model"
        )
    made = configs["vae"].get("latent_channels", 4) * patch
    encoders = [config for part, config in sorted(configs.items()) if part.startswith("text_encoder")]
    clips = [config for config in encoders if "d_model" not in config]
    widths = [config["d_model"] for config in encoders if "d_model" in config]
    joint = transformer.get("joint_attention_dim", 4096)
    rules = {
        "in_channels": (channels, made, "VAE"),
        "pooled_projection_dim": (
            transformer.get("pooled_projection_dim", pooled_width),
            sum(config.get(pooled, 512) for config in clips),
            "CLIP",
        ),
        "joint_attention_dim": (joint, widths[0] if widths else joint, "T5"),
    }
    for key, (taken, size, giver) in rules.items():
        if taken != size:
            raise ValueError(f"{start}has {key}: {taken} but whose {giver} makes {size}; give the parts of one model")
    return clips
