"""JPEG size: the reward that costs nothing and shows at once whether training works.

As in DDPO (Black et al., arXiv 2305.13301): the size of the image in kB at JPEG quality 95, colour, 4:2:0. Grey images
are encoded as colour too. A JPEG header is about 0.6 kB, so at 32 pixels compare with the size of a blank image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hrf_fast.rewards.registry import OPTION_PREFIX, Reward, register_reward
from hrf_fast.vision.base import to_bytes


@register_reward("jpeg_compressibility", needs="Pillow")
def jpeg_compressibility(quality: int = 95, *, option_prefix: str = OPTION_PREFIX) -> Reward:
    """Minus the size of the image as a JPEG, in kB: smooth, simple pictures get a high reward.

    Args:
        quality: JPEG quality, 1 to 100; the papers use 95.
    """
    return _JpegSize(f"{option_prefix}quality", quality, sign=-1)


@register_reward("jpeg_incompressibility", needs="Pillow")
def jpeg_incompressibility(quality: int = 95, *, option_prefix: str = OPTION_PREFIX) -> Reward:
    """The size of the image as a JPEG, in kB: detailed, noisy pictures get a high reward.

    Args:
        quality: JPEG quality, 1 to 100; the papers use 95.
    """
    return _JpegSize(f"{option_prefix}quality", quality, sign=1)


class _JpegSize:
    """Images [B, 3, H, W] in [0, 1] -> sign * kB, [B] fp32 on the images' device; 1 kB = 1000 bytes."""

    def __init__(self, option: str, quality: int, sign: int) -> None:
        if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
            raise ValueError(f"{option} is {quality!r}; use a whole number from 1 to 100")
        self._quality = quality
        self._sign = sign
        # Pillow lets go of the interpreter lock while it encodes
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="jpeg")

    def __call__(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        sizes = list(self._pool.map(self._kilobytes, to_bytes(images).numpy()))
        return torch.tensor(sizes, device=images.device) * self._sign

    def _kilobytes(self, pixels: Any) -> float:
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=self._quality)
        return buffer.tell() / 1000
