"""Protocols of networks that look at images, and what all of them do to a batch of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

BATCH = 256  # images per forward: bounds the memory of a 10,000-image evaluation


class FeatureNetwork(Protocol):
    """A network that turns images into vectors, whose distances are those that the Vendi Score sees."""

    name: str
    """The shipped name, folder or hub id, for reports."""

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] floating point in [0, 1] -> [B, D] fp32, without gradient."""


@runtime_checkable
class Classifier(Protocol):
    """A network that gives every image one class of each of its heads."""

    labels: dict[str, list[str]]
    """Class names of each head, in the order of the columns of `log_probs`."""

    def log_probs(self, images: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] floating point in [0, 1] -> log p(class | image), {head: [B, classes]} fp32."""


@runtime_checkable
class FeatureClassifier(Classifier, Protocol):
    """A classifier that is a `FeatureNetwork` too: its heads are over its features."""

    def features(self, images: Tensor) -> Tensor:
        """See `FeatureNetwork`."""

    def log_probs_of(self, features: Tensor) -> dict[str, Tensor]:
        """The log-probabilities of images by their features [B, D], as `log_probs` gives them."""


@torch.no_grad()
def in_batches(
    function: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, batch_size: int = BATCH
) -> Tensor:
    """Apply `function` to fp32 parts of the images on `device`, in full precision and without gradient.

    Raises:
        ValueError: the images are not [B, 3, H, W] or not floating point.
    """
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        form = f"{images.dtype} of shape {list(images.shape)}"
        raise ValueError(f"images are {form}; pass floating point [B, 3, H, W] in [0, 1] (repeat a grey channel)")
    # fp32 whatever the training precision: features of an image must not depend on the run that asks
    with torch.autocast(device.type, enabled=False):
        return torch.cat([function(part.to(device, torch.float32)) for part in images.split(batch_size)])


def to_bytes(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, H, W, 3] uint8 on the CPU, rounded to the nearest level."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
