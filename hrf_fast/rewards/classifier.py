"""The log-probability of a class under an image classifier: "make it look like a sneaker".

The classifier is one that ships with the package or any image-classification network of transformers, such as an age
model. Only the classes asked for are rewarded; a network of several labels per image (sigmoid outputs) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from hrf_fast.registry import check_count
from hrf_fast.rewards.registry import OPTION_PREFIX, Reward, register_reward
from hrf_fast.vision.load import load_classifier
from hrf_fast.vision.shipped import load_shipped


@register_reward(
    "classifier", needs="nothing for the shipped models; transformers and weights by hub id or local folder for others"
)
def classifier(
    target: str | int | Sequence[str | int],
    model: str = "fashion",
    batch_size: int = 64,
    *,
    device: torch.device | str = "cpu",
    option_prefix: str = OPTION_PREFIX,
) -> Reward:
    """Log-probability that the image is of the target class, at most 0.

    Args:
        target: a class name or index, "head=class" for a model with several heads, or a list of classes of one head,
            of which the image may be any.
        model: "fashion", "portraits" or "peeps" (shipped), or the hub id or local folder of a transformers image
            classifier.
        batch_size: images that go through a transformers network at once.
    """
    check_count(f"{option_prefix}batch_size", batch_size)
    network = load_classifier(f"{option_prefix}model", model, device, batch_size)
    head, indexes = find_classes(target, network.labels, f"{option_prefix}target")

    def reward(images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        # log of the summed probability
        return network.log_probs(images)[head][:, indexes].logsumexp(1)

    return reward


@register_reward("attribute", needs="nothing: the classifier ships")
def attribute(
    target: str | Sequence[str] | None = None,
    model: str = "peeps",
    *,
    device: torch.device | str = "cpu",
    option_prefix: str = OPTION_PREFIX,
) -> Callable[..., Tensor]:
    """Log-probability that the image has the attributes that its prompt names, or those given here; at most 0.

    Args:
        target: such as "accessories=sunglasses", or several of them; by default those in the metadata of each prompt,
            {"attributes": {"accessories": "sunglasses"}}. The mean over them is the reward.
        model: the shipped model whose classifier looks.
    """
    option = f"{option_prefix}target"
    fixed = [target] if isinstance(target, str) else target
    if fixed is not None and not (isinstance(fixed, Sequence) and all(isinstance(item, str) for item in fixed)):
        raise ValueError(f"{option} is {target!r}; give an attribute such as accessories=sunglasses, or a list of them")
    network = load_shipped(model, device)

    def reward(images: Tensor, prompts: Sequence[str] | None, metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        log_probs = network.log_probs(images)
        rewards = []
        for row, data in enumerate(metadata):
            wanted = fixed or [f"{head}={name}" for head, name in data.get("attributes", {}).items()]
            if not wanted:
                raise ValueError(
                    f"{option} is null and a prompt names no attributes; give prompts with the metadata "
                    '{"attributes": {…}} as those of prompts.source=peeps, or set target'
                )
            places = [_find_class(item, network.labels, option) for item in wanted]
            rewards.append(torch.stack([log_probs[head][row, index] for head, index in places]).mean())
        return torch.stack(rewards)

    for item in fixed or ():
        _find_class(item, network.labels, option)
    return reward


def find_classes(target: Any, labels: Mapping[str, Sequence[str]], option: str) -> tuple[str, list[int]]:
    """Resolve the target of a config.

    Args:
        target: a name, index or "head=class", or a sequence of them.
        labels: class names of each head.
        option: what the target is set by, for errors.

    Returns:
        The head and the indexes of its classes, each once.

    Raises:
        ValueError: nothing given, an unknown or ambiguous class, or classes of several heads.
    """
    targets = [target] if isinstance(target, str | int) else target
    if not isinstance(targets, Sequence) or not targets:
        raise ValueError(f"{option} is {target!r}; give a class name, an index or a list of them")
    classes = [_find_class(item, labels, option) for item in targets]
    heads = sorted({head for head, _ in classes})
    if len(heads) > 1:
        raise ValueError(f"{option} mixes the heads {', '.join(heads)}; use one reward term for each head")
    return heads[0], sorted({index for _, index in classes})


def _find_class(target: str | int, labels: Mapping[str, Sequence[str]], option: str) -> tuple[str, int]:
    """One class: by its name in any head, or in the head before the equals sign; else by its index."""
    head, equals, name = str(target).partition("=")
    if equals and head in labels:
        labels = {head: labels[head]}
    else:
        name = str(target)
    fitting: list[tuple[str, int]] = []
    if isinstance(target, str):
        wanted = name.strip().lower()
        fitting = [
            (key, index)
            for key, names in labels.items()
            for index, label in enumerate(names)
            if label.lower() == wanted
        ]
    if not fitting and name.isdecimal():
        fitting = [(key, int(name)) for key, names in labels.items() if int(name) < len(names)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        ways = " or ".join(f"{key}={index}" for key, index in fitting)
        raise ValueError(f"{option} is {target!r}, which fits {len(fitting)} classes; write {ways}")
    near = get_close_matches(name, [label for names in labels.values() for label in names], cutoff=0.4)
    nearest_names = f"the nearest are {', '.join(near)}; " if near else ""
    listed = "; ".join(
        f"{key} (0 to {len(names) - 1}): {', '.join(names[:20])}{', …' if len(names) > 20 else ''}"
        for key, names in labels.items()
    )
    raise ValueError(f"{option} is {target!r}, which is not a class; {nearest_names}the classes are {listed}")
