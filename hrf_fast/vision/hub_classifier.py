"""Classifiers of transformers: as a reward's, and as the network of a panel, which wants features beside classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hrf_fast.vision.base import BATCH
from hrf_fast.vision.hub import TRIAL, HubFeatures, HubNetwork, load_config, load_network
from hrf_fast.vision.processor import FILES, Source, load_processor

KIND = "AutoModelForImageClassification"


class HubClassifier:
    """An image classifier of transformers as a `Classifier` with the one head "label"."""

    def __init__(self, source: Source, device: torch.device | str, batch_size: int = BATCH) -> None:
        config = load_config(source)
        if config.problem_type == "multi_label_classification":
            raise source.error("which gives several labels per image", "use one with exclusive classes")
        processor = load_processor(source)
        if processor is None:
            raise source.error(
                f"whose folder {source.folder} has no {FILES[0]}, so the size and colour scale that it was trained "
                "on are unknown",
                "copy the file there",
            )
        self.labels = _labels(config)
        network, _ = load_network(source, KIND, config)
        self._logits = HubNetwork(
            source, network, processor, lambda output: output.logits, device=device, batch_size=batch_size
        )

    def log_probs(self, images: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] in [0, 1] -> {"label": [B, classes]}."""
        return {"label": self._logits(images).log_softmax(1)}


class HubFeatureClassifier:
    """Features of transformers whose classes their network's last layer tells, a `FeatureClassifier`."""

    def __init__(self, features: HubFeatures, head: nn.Module, labels: dict[str, list[str]]) -> None:
        self.name, self.labels = features.name, labels
        self._features, self._head = features, head

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] floating point in [0, 1] -> [B, D] fp32, without gradient."""
        return self._features.features(images)

    def log_probs(self, images: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] in [0, 1] -> {"label": [B, classes]}."""
        return self.log_probs_of(self.features(images))

    @torch.no_grad()
    def log_probs_of(self, features: Tensor) -> dict[str, Tensor]:
        """`log_probs` of images whose features [B, D] are known."""
        with torch.autocast(features.device.type, enabled=False):
            return {"label": self._head(features).log_softmax(1)}


def load_hub_features(source: Source, device: torch.device | str) -> HubFeatures | HubFeatureClassifier:
    """A network of transformers for a panel: with classes where it is a classifier of exclusive ones.

    Without them where its last layer, `classifier`, sees something else than `HubFeatures` has, as DINOv2's does, or
    where the image settings are missing.
    """
    features, config = HubFeatures(source, device), load_config(source)
    kinds = config.architectures or []
    exclusive = config.problem_type != "multi_label_classification" and len(config.id2label) > 1
    if not exclusive or not any(kind.endswith("ForImageClassification") for kind in kinds):
        return features
    processor = load_processor(source)
    if processor is None:
        return features
    network, _ = load_network(source, KIND, config)
    head = getattr(network, "classifier", None)
    if not isinstance(head, nn.Module):
        return features
    classifier = HubFeatureClassifier(features, head.to(device), _labels(config))
    logits = HubNetwork(source, network, processor, lambda output: output.logits, device=device)
    picture = torch.linspace(0, 1, TRIAL[1] * TRIAL[2] * TRIAL[3]).reshape(TRIAL)
    try:
        same = torch.allclose(classifier.log_probs(picture)["label"], logits(picture).log_softmax(1), atol=1e-3)
    # a layer of another width, or several that are no function
    except (RuntimeError, NotImplementedError, TypeError):
        return features
    return classifier if same else features


def _labels(config: Any) -> dict[str, list[str]]:
    return {"label": [str(config.id2label[index]) for index in range(len(config.id2label))]}
