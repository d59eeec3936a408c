"""Unconditional models: a UNet2DModel in pixels (DDPM, DDIM) or in the latents of a VQModel (LDM)."""

from __future__ import annotations

from dataclasses import replace

from hrf_fast.policies.calling import UNET
from hrf_fast.policies.checks import check_unconditional
from hrf_fast.policies.families.base import Family, PartConfigs
from hrf_fast.policies.latent import LatentPolicy
from hrf_fast.policies.pixel import PixelPolicy


def check(name: str, configs: PartConfigs) -> None:
    """See `check_unconditional`."""
    check_unconditional(name, configs["unet"])


_PARTS = {"unet": "UNet2DModel", "scheduler": ""}
PIXEL = Family(_PARTS, UNET, PixelPolicy, check)
DDPM = replace(PIXEL, flow=True)
LATENT = Family({**_PARTS, "vqvae": "VQModel"}, UNET, LatentPolicy, check)
