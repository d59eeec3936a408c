"""The ceiling: what a model's UNet calls would take at the machine's speed of a large matrix product.

An iteration's floating-point operations over its time and that speed are its model FLOPs utilisation, MFU (PaLM, arXiv
2204.02311): how much faster it could become by faster calls. Fewer calls show beside it, as images through the UNet.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hrf_fast.config.options import Config
from hrf_fast.policies.files import read_model
from hrf_fast.policies.lora import add_adapters
from hrf_fast.policies.untrained import untrained_condition, untrained_network

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def matmul_speed(device: torch.device, precision: str, *, rounds: int = 30) -> float:
    """Floating-point operations a second of a product of two large square matrices, the fastest of them.

    Not their median: another process on the machine during these seconds would lower the ceiling for all rows.
    """
    size = 8192 if device.type == "cuda" else 1536
    a = torch.randn(size, size, device=device, dtype=_DTYPES[precision])
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        # one number back from the device: it waits for the product
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    # the first one warms up
    return 2 * size**3 / min(seconds[1:])


def unet_flops(folder: Path) -> tuple[int, int]:
    """Operations of one image's forward, and of its forward and the backward to the weights; nothing is computed.

    Args:
        folder: of the UNet's config.json.
    """
    from diffusers import UNet2DModel

    with torch.device("meta"):
        unet = UNet2DModel.from_config(UNet2DModel.load_config(folder))
        latents = torch.empty(1, unet.config.in_channels, *[unet.config.sample_size] * 2)
        timesteps = torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            unet(latents, timesteps)
        with FlopCounterMode(display=False) as both:
            unet(latents, timesteps).sample.sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


def network_flops(config: Config) -> tuple[int, int]:
    """Operations of one image's forward, and of its forward and the backward to what the configuration trains.

    A call under guidance has two images. Nothing is computed.
    """
    files = read_model(config.model.name, weights=False, max_sequence_length=config.model.max_sequence_length)
    with torch.device("meta"):
        network, shape = untrained_network(files)
        if config.lora.rank:
            add_adapters(network.unet, **vars(config.lora))
        latents, timesteps = torch.empty(1, *shape), torch.zeros(1, dtype=torch.long)
        inputs = untrained_condition(files, 1, False).inputs
        # the network around the UNet casts, which the meta device has no rules for
        named: dict[str, Any] = {name: value for name, value in inputs.items() if name == "encoder_hidden_states"}
        if added := {name: value for name, value in inputs.items() if name not in named}:
            named["added_cond_kwargs"] = added
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            network.unet(latents, timesteps, **named)
        with FlopCounterMode(display=False) as both:
            network.unet(latents, timesteps, **named).sample.sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


def add_utilisation(rows: Sequence[dict[str, Any]], flops: tuple[int, int], device: torch.device) -> dict[str, float]:
    """Give every row its model FLOPs utilisation.

    Args:
        flops: operations of an image's forward, and of its forward and backward.

    Returns:
        Operations a second of a large matrix product, by precision.
    """
    without, with_gradient = flops
    speeds: dict[str, float] = {}
    for row in rows:
        precision = row["options"].get("compute.precision", "fp32")
        if precision not in speeds:
            speeds[precision] = matmul_speed(device, precision)
        row["mfu"] = statistics.median(
            ((images - learnt) * without + learnt * with_gradient) / seconds / speeds[precision]
            for images, learnt, seconds in row.pop("turns")
        )
    return speeds
