"""The columns by which NanoFlow reports RL for small JPEGs of Fashion-MNIST, for our images beside its own.

NanoFlow (github.com/tqhdesilva/nanoflow, experiments/jpeg_compression_grpo) has bits per pixel as a grey JPEG of
quality 75 and as a PNG, total variation, the share of duplicates, and how often a classifier finds the class that was
asked for. An unconditional model is asked for none: its consistency is how often the classifier finds what it found in
the pretrained model's image from equal noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hrf_fast.evaluation.diversity import mean_interval
from hrf_fast.evaluation.neighbours import duplicates
from hrf_fast.vision.base import FeatureClassifier, FeatureNetwork, to_bytes

QUALITY = 75
COLUMNS = ("jpeg_bpp", "png_bpp", "total_variation", "duplicates", "confidence", "consistency")


def bits_per_pixel(images: Tensor, **options: Any) -> Tensor:
    """Bits per pixel [N] fp32 of images [N, 3, H, W] in [0, 1], encoded in grey by Pillow's `save(**options)`."""
    pixels = images.shape[-2] * images.shape[-1]
    return torch.tensor([8 * _size(image, options) / pixels for image in to_bytes(images).numpy()])


def _size(pixels: Any, options: Mapping[str, Any]) -> int:
    """Bytes of one image [H, W, 3] uint8 in grey."""
    buffer = BytesIO()
    # luma of equal channels is their value
    Image.fromarray(pixels).convert("L").save(buffer, **options)
    return buffer.tell()


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of horizontal neighbours plus that of vertical ones, in grey, [N].

    Args:
        images: [N, 3, H, W] in [0, 1], of at least 2 pixels a side.
    """
    grey = images.float().mean(1)
    across, down = grey.diff(dim=2).abs(), grey.diff(dim=1).abs()
    return across.mean((1, 2)) + down.mean((1, 2))


def nanoflow_columns(
    images: Tensor, pretrained: Tensor, network: FeatureNetwork | None = None, *, seed: int
) -> dict[str, list[float]]:
    """All columns by name, each [value, low, high] by bootstrap; duplicates, a share of images, have no interval.

    Args:
        images: [N, 3, H, W] in [0, 1]; pretrained: the pretrained model's, from equal noise.
        network: a classifier with the head `label`; any other leaves out confidence and consistency.
        seed: of the bootstrap.
    """
    images = images.detach().cpu()
    per_image = {
        "jpeg_bpp": bits_per_pixel(images, format="JPEG", quality=QUALITY),
        "png_bpp": bits_per_pixel(images, format="PNG"),
        "total_variation": total_variation(images),
    }
    if isinstance(network, FeatureClassifier) and "label" in network.labels:
        after, before = (network.log_probs(part)["label"].cpu() for part in (images, pretrained))
        per_image["confidence"], classes = after.exp().max(1)
        per_image["consistency"] = (classes == before.argmax(1)).float()
    columns = {name: list(mean_interval(values, seed=seed)) for name, values in per_image.items()}
    columns["duplicates"] = [duplicates(images)]
    return {name: columns[name] for name in COLUMNS if name in columns}
