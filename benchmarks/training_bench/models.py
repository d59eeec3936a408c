"""Models to time: the shipped ones, and published layouts with random weights, which cost as much as trained ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from hrf_fast.assets import ASSETS, SHIPPED

# google/ddpm-* have these in common
_GOOGLE: dict[str, Any] = {
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def _levels(channels: tuple[int, ...], attention: int) -> dict[str, Any]:
    """Block types of a UNet with attention at one level, counted from the finest."""
    down = ["DownBlock2D"] * len(channels)
    down[attention] = "AttnDownBlock2D"
    up = ["UpBlock2D"] * len(channels)
    up[len(channels) - 1 - attention] = "AttnUpBlock2D"
    return {"block_out_channels": channels, "down_block_types": tuple(down), "up_block_types": tuple(up)}


LAYOUTS: dict[str, dict[str, Any]] = {
    # google/ddpm-cifar10-32, 35.7 M parameters
    "cifar": {"sample_size": 32, **_GOOGLE, **_levels((128, 256, 256, 256), 1)},
    # google/ddpm-celebahq-256, 113.7 M parameters
    "celebahq": {"sample_size": 256, **_GOOGLE, **_levels((128, 128, 256, 256, 512, 512), 4)},
    # nothing to learn from but that everything runs
    "tiny": {
        "sample_size": 16,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        **_levels((8, 16), 1),
    },
}
MODELS = (*SHIPPED, *LAYOUTS)


def make_model(name: str, folder: Path, seed: int) -> str:
    """The value of model.name: a shipped name as it is, or a new diffusers folder below `folder`.

    Raises:
        ValueError: no such model.
    """
    if name in SHIPPED:
        return name
    if name not in LAYOUTS:
        raise ValueError(f"--models has {name!r}; use {', '.join(MODELS)}")
    import torch
    from diffusers import DDPMScheduler, UNet2DModel

    target = folder / name
    if not target.exists():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            unet = UNet2DModel(in_channels=3, out_channels=3, **LAYOUTS[name])
        unet.save_pretrained(target / "unet")
        DDPMScheduler(beta_start=1e-4, beta_end=0.02).save_pretrained(target / "scheduler")
    return str(target)


def without_clipping(spec: str, folder: Path) -> str:
    """A shipped model as a folder whose scheduler does not clip x̂0; another model as it is.

    A pixel whose x̂0 is within rounding of the bound has a gradient or has none. Images of a trained model have many
    there, and two such pixels among 200,000 moved a gradient by 0.2 %: no two ways to round could be held to equal
    weights. Clipping takes no time. Random weights need it: without it their images grow at every step.
    """
    if spec not in SHIPPED:
        return spec
    from diffusers import DDPMScheduler

    target = folder / spec
    shutil.copytree(ASSETS / spec / "model", target, dirs_exist_ok=True)
    scheduler = DDPMScheduler.from_pretrained(target, subfolder="scheduler", clip_sample=False)
    scheduler.save_pretrained(target / "scheduler")
    return str(target)
