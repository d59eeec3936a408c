"""The small classifiers that ship with the package, one per shipped model, and real images to compare with.

`pretraining/train_classifiers.py` trains them; what is computed from their features and log-probabilities is in
`evaluation/diversity.py` and `evaluation/vendi.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hrf_fast.assets import ASSETS, DATA, SHIPPED
from hrf_fast.registry import nearest
from hrf_fast.vision.base import in_batches
from hrf_fast.weights import judge

REFERENCES = 512
# height and width of images, where a config names none
PIXELS = 32
STAGES = ((5, 2), (3, 2), (3, 1), (3, 2))  # kernel and stride: 32 pixels become 16, 8, 8 and 4


class ShippedNetwork(nn.Module):
    """A small convolutional classifier: one or several heads over one feature vector.

    Args:
        channels: 1 to look at the mean of the colour channels, 3 to look at colour.
        widths: output channels of the four convolutions.
        feature_dim: D, the width of the layer under the heads.
        heads: number of classes of each head.
        pixels: height and width of its images, a multiple of 8.
    """

    def __init__(
        self, channels: int, widths: Sequence[int], feature_dim: int, heads: Mapping[str, int], pixels: int = PIXELS
    ) -> None:
        super().__init__()
        self.channels, self.pixels = channels, pixels
        layers: list[nn.Module] = []
        for (kernel, stride), incoming, width in zip(STAGES, (channels, *widths[:-1]), widths, strict=True):
            convolution = nn.Conv2d(incoming, width, kernel, stride, padding=kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())
        # the last normalisation centres the features: without it every cosine between two of them is near 1
        linear = nn.Linear((pixels // 8) ** 2 * widths[-1], feature_dim, bias=False)
        self.embed = nn.Sequential(linear, nn.BatchNorm1d(feature_dim, affine=False))
        self.heads = nn.ModuleDict({name: nn.Linear(feature_dim, count) for name, count in heads.items()})

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, pixels, pixels] in [0, 1] -> [B, D], before the non-linearity."""
        if self.channels == 1:
            images = images.mean(1, keepdim=True)
        return self.embed(self.body(images * 2 - 1))

    def log_probs(self, features: Tensor) -> dict[str, Tensor]:
        """[B, D] -> {head: [B, classes]}."""
        return {name: F.log_softmax(head(F.relu(features)), 1) for name, head in self.heads.items()}


class ShippedClassifier:
    """A shipped network in evaluation mode, a `FeatureClassifier`; built by `load_shipped`."""

    def __init__(self, name: str, network: ShippedNetwork, labels: dict[str, list[str]]) -> None:
        self.name, self.labels = name, labels
        self.channels, self.pixels = network.channels, network.pixels
        self._network = network.eval()

    def features(self, images: Tensor) -> Tensor:
        """Features of the layer under the heads, centred on the training images.

        Args:
            images: [B, 3, H, W] floating point in [0, 1]; resized to the network's size (antialiased bilinear) if need
                be.

        Returns:
            [B, D] fp32 on the network's device, without gradient.

        Raises:
            ValueError: the images are not [B, 3, H, W] or not floating point.
        """
        return in_batches(self._features, images, next(self._network.parameters()).device)

    def log_probs(self, images: Tensor) -> dict[str, Tensor]:
        """log p(class | image) of every head, {head: [B, classes]}; arguments and errors as `features`."""
        return self.log_probs_of(self.features(images))

    @torch.no_grad()
    def log_probs_of(self, features: Tensor) -> dict[str, Tensor]:
        """`log_probs` of images whose features [B, D] are known."""
        with torch.autocast(features.device.type, enabled=False):
            return self._network.log_probs(features)

    def _features(self, images: Tensor) -> Tensor:
        size = (self.pixels, self.pixels)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return self._network.features(images)


def load_shipped(name: str, device: str | torch.device = "cpu") -> ShippedClassifier:
    """Open the classifier of a shipped data set.

    Raises:
        ValueError: no classifier of this name ships, or its file is damaged.
    """
    folder, config = _read_classifier(name)
    labels: dict[str, list[str]] = config["labels"]
    network = ShippedNetwork(**config["architecture"], heads={head: len(names) for head, names in labels.items()})
    needed = {key: tensor.shape for key, tensor in network.state_dict().items()}
    network.load_state_dict(_load_tensors(folder / "model.safetensors", needed))
    return ShippedClassifier(name, network.to(device), labels)


def load_reference(name: str) -> Tensor:
    """Real images of a shipped data set, held out from the training of its diffusion model and of its classifier.

    (Of the portraits some ten are drawn alike by a training seed: the parts of a face are finite.)

    Returns:
        [REFERENCES, 3, H, W] fp32 in [0, 1] of the classifier's size; a grey data set repeats its channel.

    Raises:
        ValueError: no reference of this name ships, or its file is damaged.
    """
    folder, config = _read_classifier(name)
    architecture = config["architecture"]
    pixels = architecture.get("pixels", PIXELS)
    shape = (REFERENCES, architecture["channels"], pixels, pixels)
    images = _load_tensors(folder.parent / "reference.safetensors", {"images": shape})["images"]
    return (images.float() / 255).expand(-1, 3, -1, -1).contiguous()


def _load_tensors(path: Path, needed: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The tensors of these names in a file of this package, which must have these shapes and be finite."""
    try:
        tensors = {name: tensor for name, tensor in load_file(path).items() if name in needed}
        problem = judge(needed, tensors)
    except (OSError, SafetensorError) as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{path}, a file of this package, is damaged: {problem}; install hrf_fast again")
    return tensors


def _read_classifier(name: str) -> tuple[Path, dict[str, Any]]:
    """The folder and the config of a shipped classifier."""
    folder = _shipped_folder(name) / "classifier"
    return folder, json.loads((folder / "config.json").read_text())


def _shipped_folder(name: str) -> Path:
    if name not in SHIPPED:
        shipped = ", ".join(SHIPPED)
        raise ValueError(f"{name!r}{nearest(str(name), SHIPPED)} does not ship with the package; use one of {shipped}")
    return ASSETS / DATA.get(name, name)
