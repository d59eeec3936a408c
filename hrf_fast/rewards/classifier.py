"""The log-probability of a class under an image classifier: "make it look like a sneaker".

The classifier is one that ships with the package or any image-classification network of transformers, such as an age
model. Only the classes asked for are rewarded; a network of several labels per image (sigmoid outputs) is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hrf_fast.assets import SHIPPED
from hrf_fast.registry import nearest
from hrf_fast.rewards.pretrained import (
    Preprocessor,
    check_batch_size,
    check_folder,
    check_text,
    load_config,
    load_network,
    read_preprocessor,
)
from hrf_fast.rewards.registry import Reward, register_reward, require


class Scorer(Protocol):
    """What the reward asks of a classifier."""

    labels: dict[str, list[str]]
    """Class names of each head."""

    def log_probs(self, images: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] in [0, 1] -> [B, K] per head."""


@register_reward(
    "classifier", needs="nothing for the shipped models; transformers and weights by hub id or local folder for others"
)
def classifier(
    target: str | int | Sequence[str | int],
    model: str = "fashion",
    batch_size: int = 64,
    *,
    device: torch.device | str = "cpu",
) -> Reward:
    """Log-probability that the image is of the target class, at most 0.

    Args:
        target: a class name or index, "head=class" for a model with several heads, or a list of classes of one head,
            of which the image may be any.
        model: "fashion" or "portraits" (shipped), or the hub id or local folder of a transformers image classifier.
        batch_size: images that go through a transformers network at once.
    """
    check_batch_size("classifier.batch_size", batch_size)
    check_text("classifier.model", model, f"{', '.join(SHIPPED)}, a hub id or a local folder")
    scorer: Scorer
    if model in SHIPPED:
        from hrf_fast.vision.shipped import load_scorer

        scorer = load_scorer(model, device)
    else:
        scorer = _TransformersScorer(model, batch_size, device)
    return _ClassLogProb(scorer, *find_classes(target, scorer.labels))


class _ClassLogProb:
    """Images [B, 3, H, W] in [0, 1] -> log of the summed probability of some classes of one head, [B] fp32."""

    def __init__(self, scorer: Scorer, head: str, indexes: list[int]) -> None:
        self._scorer = scorer
        self._head = head
        self._indexes = indexes

    def __call__(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        return self._scorer.log_probs(images)[self._head][:, self._indexes].logsumexp(1)


class _TransformersScorer:
    """An image classifier of transformers, read from a hub id or folder, as a `Scorer` with the one head "label"."""

    def __init__(self, model: str, batch_size: int, device: torch.device | str) -> None:
        option = "classifier.model"
        if "/" not in model and not Path(model).expanduser().is_dir():
            raise ValueError(
                f"{option} is {model!r}{nearest(model, SHIPPED)}; use one of {', '.join(SHIPPED)}, "
                'a hub id of the form "owner/name", or a local folder'
            )
        config = load_config(option, model)
        if config.problem_type == "multi_label_classification":
            raise ValueError(
                f"{option} is {model!r}, which gives several labels per image; use one with exclusive classes"
            )
        settings = read_preprocessor(option, model)
        if settings is None:
            where = "that folder" if check_folder(option, model) else "its repository"
            raise ValueError(
                f"{option} is {model!r}, but there is no preprocessor_config.json in {where}, so the size and colour "
                "scale that it was trained on are unknown; copy the file there"
            )
        self.labels = {"label": [str(config.id2label[index]) for index in range(len(config.id2label))]}
        self._preprocess = Preprocessor.from_settings(settings, option)
        network_class = require("transformers", reward="classifier").AutoModelForImageClassification
        self._network: nn.Module = load_network(option, model, network_class, config, device)
        self._device = torch.device(device)
        self._batch_size = batch_size

    def log_probs(self, images: Tensor) -> dict[str, Tensor]:
        chunks = images.to(self._device).split(self._batch_size)
        logits = torch.cat([self._network(pixel_values=self._preprocess(chunk)).logits for chunk in chunks])
        return {"label": logits.log_softmax(1)}


def find_classes(target: Any, labels: Mapping[str, Sequence[str]]) -> tuple[str, list[int]]:
    """Resolve the target of a config.

    Args:
        target: a name, index or "head=class", or a sequence of them.
        labels: class names of each head.

    Returns:
        The head and the indexes of its classes, each once.

    Raises:
        ValueError: nothing given, an unknown or ambiguous class, or classes of several heads.
    """
    targets = [target] if isinstance(target, str | int) else target
    if not isinstance(targets, Sequence) or not targets:
        raise ValueError(f"classifier.target is {target!r}; give a class name, an index or a list of them")
    found = [_find_class(item, labels) for item in targets]
    heads = sorted({head for head, _ in found})
    if len(heads) > 1:
        raise ValueError(f"classifier.target mixes the heads {', '.join(heads)}; use one reward term for each head")
    return heads[0], sorted({index for _, index in found})


def _find_class(target: str | int, labels: Mapping[str, Sequence[str]]) -> tuple[str, int]:
    """One class: by its name in any head, or in the head before the equals sign; else by its index."""
    head, equals, name = str(target).partition("=")
    if equals and head in labels:
        labels = {head: labels[head]}
    else:
        name = str(target)
    found: list[tuple[str, int]] = []
    if isinstance(target, str):
        wanted = name.strip().lower()
        found = [(key, i) for key, names in labels.items() for i, label in enumerate(names) if label.lower() == wanted]
    if not found and name.isdecimal():
        found = [(key, int(name)) for key, names in labels.items() if int(name) < len(names)]
    if len(found) == 1:
        return found[0]
    if found:
        ways = " or ".join(f"{key}={index}" for key, index in found)
        raise ValueError(f"classifier.target is {target!r}, which fits {len(found)} classes; write {ways}")
    near = get_close_matches(name, [label for names in labels.values() for label in names], cutoff=0.4)
    nearest_names = f"the nearest are {', '.join(near)}; " if near else ""
    listed = "; ".join(
        f"{key} (0 to {len(names) - 1}): {', '.join(names[:20])}{', …' if len(names) > 20 else ''}"
        for key, names in labels.items()
    )
    raise ValueError(f"classifier.target is {target!r}, which is not a class; {nearest_names}the classes are {listed}")
