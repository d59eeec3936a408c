"""Networks as a config names them: shipped, a folder or a hub id."""

from __future__ import annotations

from typing import Any

import torch

from hrf_fast.assets import ASSETS, DATA, SHIPPED
from hrf_fast.vision.base import BATCH, Classifier, FeatureNetwork
from hrf_fast.vision.hub import find_network
from hrf_fast.vision.hub_classifier import HubClassifier, load_hub_features
from hrf_fast.vision.shipped import load_shipped

FOLDERS = {name: ASSETS / DATA.get(name, name) / "classifier" for name in SHIPPED}


def load_feature_network(option: str, value: Any, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Open a network that turns images into features; a `FeatureClassifier` where it knows classes too.

    Args:
        option, value: the option that names the network, for errors, and what it was set to: a shipped name, a folder
            written by `save_pretrained`, or a hub id ("openai/clip-vit-base-patch32").

    Raises:
        ImportError: transformers is needed and not installed.
        ValueError: no such network, not one that looks at images, or a checkpoint without some of its weights.
    """
    if isinstance(value, str) and value in FOLDERS:
        return load_shipped(value, device)
    return load_hub_features(find_network(option, value, FOLDERS), device)


def load_classifier(option: str, value: Any, device: torch.device | str = "cpu", batch_size: int = BATCH) -> Classifier:
    """Open a network that gives every image a class; `batch_size` images go through a transformers network at once.

    Arguments and errors as `load_feature_network`; also refused is a network of several labels per image, or one that
    was saved without its image settings.
    """
    if isinstance(value, str) and value in FOLDERS:
        return load_shipped(value, device)
    return HubClassifier(find_network(option, value, FOLDERS), device, batch_size)
