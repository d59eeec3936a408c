"""Attention by name: torch's scaled_dot_product_attention, or xformers where a CUDA device has it.

Left out: diffusers' `set_attention_backend`, which takes "xformers" on a UNet in silence and changes nothing.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from hrf_fast.config.run_options import ATTENTIONS
from hrf_fast.registry import nearest


def set_attention(unet: Any, name: str) -> None:
    """Let a diffusers UNet compute its attention as compute.attention says; sdpa is what it does by itself.

    Args:
        unet: on the device that it will run on.

    Raises:
        ImportError: xformers is missing; says how to install it.
        ValueError: an unknown name, or xformers without a CUDA device or without an attention to serve.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"compute.attention is {name!r}{nearest(name, ATTENTIONS)}; use {', '.join(ATTENTIONS)}")
    if name == "sdpa":
        return
    device = next(unet.parameters()).device
    refusal = "compute.attention is 'xformers', but {}; use sdpa"
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(refusal.format(f"xformers has no operator for the device {device}"))
    layers = [module for module in unet.modules() if hasattr(module, "set_use_memory_efficient_attention_xformers")]
    layers = [layer for layer in layers if hasattr(layer, "processor")]
    if not layers:
        raise ValueError(refusal.format("this UNet has no attention"))
    if find_spec("xformers") is None:
        raise ImportError("compute.attention is 'xformers': `pip install \"hrf_fast[gpu]\"` brings it; or use sdpa")
    try:
        # runs its operator once
        unet.enable_xformers_memory_efficient_attention()
    except Exception as error:
        raise ValueError(refusal.format(f"it does not run here ({type(error).__name__}: {error})")) from error
    others = {type(layer.processor).__name__ for layer in layers} - {"XFormersAttnProcessor"}
    if others:
        raise ValueError(refusal.format(f"this UNet's {', '.join(sorted(others))} can't take it"))
