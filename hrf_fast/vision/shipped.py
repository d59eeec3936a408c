"""Networks that look at images, so that diversity and class scores mean something: shipped ones and hub ones.

`load_scorer` opens the small classifier of a shipped data set (class log-probabilities and features);
`load_feature_network` also takes any transformers vision model, for features only. The shipped ones are trained by
`pretraining/train_scorers.py`; what is computed from features and log-probabilities is in `diversity.py`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hrf_fast.assets import ASSETS, SHIPPED
from hrf_fast.registry import nearest

PIXELS = 32
BATCH = 256  # images per forward: bounds the memory of a 10,000-image evaluation
STAGES = ((5, 2), (3, 2), (3, 1), (3, 2))  # kernel and stride: 32 pixels become 16, 8, 8 and 4


class ScoringNetwork(nn.Module):
    """A small convolutional classifier: one or several heads over one feature vector.

    Args:
        channels: 1 to look at the mean of the colour channels, 3 to look at colour.
        widths: output channels of the four convolutions.
        feature_dim: D, the width of the layer under the heads.
        heads: number of classes of each head.
    """

    def __init__(self, channels: int, widths: Sequence[int], feature_dim: int, heads: Mapping[str, int]) -> None:
        super().__init__()
        self.channels = channels
        layers: list[nn.Module] = []
        for (kernel, stride), incoming, width in zip(STAGES, (channels, *widths[:-1]), widths, strict=True):
            convolution = nn.Conv2d(incoming, width, kernel, stride, padding=kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())
        # the last normalisation centres the features: without it every cosine between two of them is near 1
        linear = nn.Linear(4 * 4 * widths[-1], feature_dim, bias=False)
        self.embed = nn.Sequential(linear, nn.BatchNorm1d(feature_dim, affine=False))
        self.heads = nn.ModuleDict({name: nn.Linear(feature_dim, count) for name, count in heads.items()})

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, 32, 32] in [0, 1] -> [B, D], before the non-linearity."""
        if self.channels == 1:
            images = images.mean(1, keepdim=True)
        return self.embed(self.body(images * 2 - 1))

    def log_probs(self, features: Tensor) -> dict[str, Tensor]:
        """[B, D] -> {head: [B, classes]}."""
        return {name: F.log_softmax(head(F.relu(features)), 1) for name, head in self.heads.items()}


class FeatureNetwork(Protocol):
    """What diversity needs of a network: a name for the report, and features [B, D] of images [B, 3, H, W]."""

    name: str

    def features(self, images: Tensor) -> Tensor: ...


class Scorer:
    """A shipped scoring network in evaluation mode; built by `load_scorer`.

    Attributes:
        name: one of `SHIPPED`.
        labels: class names of each head, in the order of the columns of `log_probs`.
    """

    def __init__(self, name: str, network: ScoringNetwork, labels: dict[str, list[str]]) -> None:
        self.name, self.labels = name, labels
        self._network = network.eval()

    def features(self, images: Tensor) -> Tensor:
        """Features of the layer under the heads, centred on the training images.

        Args:
            images: [B, 3, H, W] floating point in [0, 1]; resized to 32 x 32 (antialiased bilinear) if need be.

        Returns:
            [B, D] fp32 on the network's device, without gradient.

        Raises:
            ValueError: the images are not [B, 3, H, W] or not floating point.
        """
        return _in_batches(self._features, images, next(self._network.parameters()).device)

    @torch.no_grad()
    def log_probs(self, images: Tensor) -> dict[str, Tensor]:
        """log p(class | image) of every head, {head: [B, classes]}; otherwise as `features`."""
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            return self._network.log_probs(features)

    def _features(self, images: Tensor) -> Tensor:
        return self._network.features(_resize(images, PIXELS, "bilinear"))


def load_scorer(name: str, device: str | torch.device = "cpu") -> Scorer:
    """Open the scoring network of a shipped data set.

    Raises:
        ValueError: no scoring network of this name ships.
    """
    folder = _shipped_folder(name) / "scorer"
    config = json.loads((folder / "config.json").read_text())
    labels: dict[str, list[str]] = config["labels"]
    network = ScoringNetwork(**config["architecture"], heads={head: len(names) for head, names in labels.items()})
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return Scorer(name, network.to(device), labels)


def load_reference(name: str) -> Tensor:
    """Real images of a shipped data set, held out from the training of its DDPM and of its scoring network.

    (Of the portraits some ten are drawn alike by a training seed: the parts of a face are finite.)

    Returns:
        [512, 3, 32, 32] fp32 in [0, 1]; a grey data set repeats its channel.

    Raises:
        ValueError: no reference of this name ships.
    """
    images = load_file(_shipped_folder(name) / "reference.safetensors")["images"]
    return (images.float() / 255).expand(-1, 3, -1, -1).contiguous()


def load_feature_network(spec: str, device: str | torch.device = "cpu") -> FeatureNetwork:
    """Open a network that turns images into features: a shipped scorer or a transformers vision model.

    Args:
        spec: a shipped name, a folder written by `save_pretrained`, or a hub id ("openai/clip-vit-base-patch32").

    Raises:
        ValueError: neither shipped, nor a folder, nor of the form of a hub id; or not a vision model; or a
            checkpoint without some of the weights that the features depend on.
        ImportError: transformers is needed and not installed.
        OSError: transformers can't read the model from the folder or the hub.
    """
    if spec in SHIPPED:
        return load_scorer(spec, device)
    if not Path(spec).is_dir() and not _looks_like_a_hub_id(spec):
        names = f"a shipped one ({', '.join(SHIPPED)}), a folder that exists or a hub id (owner/model)"
        raise ValueError(f"there is no feature network {spec!r}{nearest(spec, SHIPPED)}; name {names}")
    return _TransformersFeatures(spec, torch.device(device))


class _TransformersFeatures:
    """The pooled output of a transformers vision model; of CLIP and its kind the vision half, before its projection.

    Images become the model's square, whatever their shape, by antialiased bicubic interpolation and are normalised
    by the mean and std of its image processor. The processor itself is not used: it may need torchvision.
    """

    def __init__(self, spec: str, device: torch.device) -> None:
        try:
            from transformers import AutoModel, ImageProcessingMixin
        except ImportError as error:
            need = f"the feature network {spec!r} needs transformers"
            raise ImportError(f'{need}; run `pip install "hrf_fast[rewards]"`') from error
        try:
            model, loading = AutoModel.from_pretrained(spec, output_loading_info=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            way_out = f"fetch it once with network (`hf download {spec}`), or name a local folder or one of {SHIPPED}"
            raise OSError(f"can't load the feature network {spec!r}: {reason} To go on, {way_out}") from error
        vision = getattr(model, "vision_model", model)
        if vision.main_input_name != "pixel_values":
            kind = type(vision).__name__
            raise ValueError(f"{spec!r} is a {kind}, which does not look at images; name a vision model")
        missing = {key for key in loading["missing_keys"] if "text_model" not in key}
        # classification checkpoints have no pooler: a freshly initialised one would give random features
        self._use_pooler = not any("pooler" in key for key in missing)
        if lost := sorted(key for key in missing if "pooler" not in key):
            lack = f"lacks {len(lost)} weights that its config asks for ({lost[0]}, …)"
            raise ValueError(f"the checkpoint {spec!r} {lack}; its features would be noise, name a complete one")
        try:
            processor: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(spec)[0]
        except OSError:
            processor = {}
            assumed = "images are normalised with mean 0.5 and std 0.5"
            warnings.warn(f"{spec!r} has no preprocessor_config.json: {assumed}", stacklevel=3)
        self.name, self._vision = spec, vision.float().to(device).eval()
        self._pixels = _square(getattr(vision.config, "image_size", None) or processor.get("crop_size") or 224)
        self._mean = torch.tensor(processor.get("image_mean", [0.5] * 3), device=device).view(3, 1, 1)
        self._std = torch.tensor(processor.get("image_std", [0.5] * 3), device=device).view(3, 1, 1)

    def features(self, images: Tensor) -> Tensor:
        """Pooled output [B, D] fp32, without gradient; arguments and errors as `Scorer.features`."""
        return _in_batches(self._features, images, self._mean.device)

    def _features(self, images: Tensor) -> Tensor:
        pixels = (_resize(images, self._pixels, "bicubic").clamp(0, 1) - self._mean) / self._std
        output = self._vision(pixel_values=pixels)
        if self._use_pooler and output.get("pooler_output") is not None:
            return output.pooler_output.flatten(1)
        hidden = output.last_hidden_state
        # tokens [B, 1 + N, D]: the class token; a feature map [B, D, H, W]: its mean
        return hidden[:, 0] if hidden.dim() == 3 else hidden.mean((2, 3))


@torch.no_grad()
def _in_batches(function: Callable[[Tensor], Tensor], images: Tensor, device: torch.device) -> Tensor:
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        found = f"{images.dtype} of shape {list(images.shape)}"
        raise ValueError(f"images are {found}; pass floating point [B, 3, H, W] in [0, 1] (repeat a grey channel)")
    # fp32 whatever the training precision: features of the same image must not depend on the run that asks
    with torch.autocast(device.type, enabled=False):
        return torch.cat([function(part.to(device, torch.float32)) for part in images.split(BATCH)])


def _resize(images: Tensor, pixels: int, mode: str) -> Tensor:
    if images.shape[2:] == (pixels, pixels):
        return images
    return F.interpolate(images, (pixels, pixels), mode=mode, align_corners=False, antialias=True)


def _square(size: Any) -> int:
    """A transformers image size (a number, a pair, or {"height": …} / {"shortest_edge": …}) as one number."""
    if isinstance(size, Mapping):
        size = size.get("height") or size["shortest_edge"]
    return int(size[0] if isinstance(size, Sequence) else size)


def _shipped_folder(name: str) -> Path:
    if name not in SHIPPED:
        shipped = ", ".join(SHIPPED)
        raise ValueError(f"{name!r}{nearest(name, SHIPPED)} does not ship with the package; use one of {shipped}")
    return ASSETS / name


def _looks_like_a_hub_id(spec: str) -> bool:
    return spec.count("/") == 1 and not spec.startswith((".", "/", "~")) and not spec.endswith("/")
