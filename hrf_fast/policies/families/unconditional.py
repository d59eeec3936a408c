"""Unconditional models: a UNet2DModel in pixels (DDPM, DDIM) or in the latents of a VQModel (LDM)."""

from __future__ import annotations

from dataclasses import replace

from hrf_fast.policies.calling import UNET
from hrf_fast.policies.families.base import Family, PartConfig, PartConfigs
from hrf_fast.policies.families.checks import check_size
from hrf_fast.policies.latent import LatentPolicy
from hrf_fast.policies.pixel import PixelPolicy
from hrf_fast.policies.schedulers import FLOW_SCHEDULER

# settings of a UNet2DModel by which something else than the step steers it
_CONDITIONED = ("num_class_embeds", "class_embed_type", "cross_attention_dim", "encoder_hid_dim", "addition_embed_type")
_BLOCKS = ("down_block_types", "mid_block_type", "up_block_types")


def check(name: str, configs: PartConfigs) -> None:
    """Refuse a UNet2DModel that anything but the noisy image and a discrete step goes into.

    Its output, its size and its table of steps are to be those that the sampler needs.
    """
    unet, scheduler, start = configs["unet"], configs["scheduler"], f"model.name is {name!r}, "
    conditions = {key: unet[key] for key in _CONDITIONED if unet.get(key) is not None}
    blocks = {key: unet[key] for key in _BLOCKS if "CrossAttn" in str(unet.get(key))}
    for key, value in (conditions | blocks).items():
        raise ValueError(
            f"{start}whose UNet is conditioned on a class or a text ({key}: {value!r}), which is not supported; use an "
            "unconditional model"
        )
    time = unet.get("time_embedding_type", "positional")
    if time not in ("positional", "learned"):
        raise ValueError(
            f"{start}whose UNet takes noise levels instead of steps (time_embedding_type: {time!r}) as score-based VE "
            "models do; use a model of DDPM's kind, whose time_embedding_type is positional"
        )
    if time == "learned":
        _check_table(start, unet.get("num_train_timesteps"), scheduler)
    taken, returned = unet.get("in_channels", 3), unet.get("out_channels", 3)
    if returned != taken:
        raise ValueError(
            f"{start}whose UNet returns {returned} channels for {taken}: a learned variance, which is not supported; "
            "use a model of fixed variance"
        )
    size = unet.get("sample_size")
    if size is None or (taken not in (1, 3) and "vqvae" not in configs):
        raise ValueError(
            f"{start}whose UNet takes {taken} channels of size {size}; a pixel-space model of 1 or 3 channels with a "
            "sample_size is needed, or an LDMPipeline with its vqvae"
        )
    check_size(name, size, unet)


def _check_table(start: str, learned: int | None, scheduler: PartConfig) -> None:
    """Refuse a UNet's table of learned steps that lacks those of its scheduler."""
    if scheduler.get("_class_name") == FLOW_SCHEDULER:
        raise ValueError(
            f"{start}a flow-matching model whose UNet has time_embedding_type: 'learned', a table of whole steps; its "
            "sigmas need positional"
        )
    needed = scheduler.get("num_train_timesteps", 1000)
    if learned is not None and learned < needed:
        raise ValueError(
            f"{start}whose UNet has learned {learned} steps but whose scheduler has {needed}; use the scheduler that "
            "the model was trained with"
        )


_PARTS = {"unet": "UNet2DModel", "scheduler": ""}
PIXEL = Family(_PARTS, UNET, PixelPolicy, check)
DDPM = replace(PIXEL, flow=True)
LATENT = Family({**_PARTS, "vqvae": "VQModel"}, UNET, LatentPolicy, check)
