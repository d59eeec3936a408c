"""Checks of SD3 and FLUX: what their configs say that the trainer can't drive, each refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hrf_fast.policies.calling import FLUX


def check_transformer(name: str, pipeline: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a transformer whose inputs are not what the VAE and the text encoders make.

    Args:
        name: model.name, for errors; pipeline: its class; configs: of its parts by name, as their files have them.
    """
    transformer, start = configs["transformer"], f"model.name is {name!r}, whose transformer "
    flux = pipeline == FLUX
    channels = transformer.get("in_channels", 64 if flux else 16)
    returned = transformer.get("out_channels") or channels
    if returned != channels:
        raise ValueError(
            f"{start}takes {channels} channels and returns {returned}: one for inpainting or editing, whose pictures "
            "to begin with nobody draws here; use a text-to-image model"
        )
    # FLUX's tokens are patches of 2 x 2 latents
    made = configs["vae"].get("latent_channels", 4) * (4 if flux else 1)
    encoders = [config for part, config in sorted(configs.items()) if part.startswith("text_encoder")]
    clips = [config for config in encoders if "d_model" not in config]
    pooled = sum(config.get("hidden_size" if flux else "projection_dim", 512) for config in clips)
    widths = [config["d_model"] for config in encoders if "d_model" in config]
    joint = transformer.get("joint_attention_dim", 4096)
    rules = {
        "in_channels": (channels, made, "VAE"),
        "pooled_projection_dim": (transformer.get("pooled_projection_dim", 768 if flux else 2048), pooled, "CLIP"),
        "joint_attention_dim": (joint, widths[0] if widths else joint, "T5"),
    }
    for key, (taken, size, giver) in rules.items():
        if taken != size:
            raise ValueError(f"{start}has {key}: {taken} but whose {giver} makes {size}; give the parts of one model")
    side = sum(config.get("hidden_size", 512) for config in clips)
    if not flux and side > joint:
        raise ValueError(
            f"{start}has joint_attention_dim: {joint} but whose two CLIPs make {side}; give the parts of one model"
        )
