"""LAION aesthetic score: how much people like a picture, from 1 to 10, by a linear map of its CLIP embedding.

Two published heads load, told apart by their weights: the first predictor (one linear layer) and the improved one (five
linear layers with dropout between them and no activation), which DDPO trains on. Both read the L2-normalised image
embedding of CLIP ViT-L/14. Heads with activations are refused: their file does not say which.
Nothing ships with the package: weights come from the hub or from local paths.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hrf_fast.hub import find_file, first_line
from hrf_fast.registry import check_count
from hrf_fast.rewards.registry import OPTION_PREFIX, Reward, register_reward
from hrf_fast.vision.hub import HubNetwork, find_network, load_config, load_network
from hrf_fast.vision.processor import Source, import_transformers, load_processor
from hrf_fast.weights import not_finite

# state-dict prefixes of the linear layers and their output widths
HEADS: dict[tuple[str, ...], tuple[int, ...]] = {
    ("",): (1,),
    ("layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7."): (1024, 128, 64, 16, 1),
}


@register_reward("aesthetic", needs="transformers, and CLIP and head weights by hub id or local path")
def aesthetic(
    clip: str = "openai/clip-vit-large-patch14",
    head: str = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth",
    batch_size: int = 16,
    *,
    device: torch.device | str = "cpu",
    option_prefix: str = OPTION_PREFIX,
) -> Reward:
    """LAION aesthetic score of the image, roughly 1 to 10: CLIP embedding, then a linear or five-layer head.

    Args:
        clip: hub id or local folder of the CLIP that the head was trained on (ViT-L/14 for the published heads).
        head: a .safetensors, .pth or .pt file, or "owner/repository:filename" on the hub.
        batch_size: images that go through CLIP at once.
    """
    check_count(f"{option_prefix}batch_size", batch_size)
    head_option = f"{option_prefix}head"
    layers = build_head(load_head(head, head_option), head, head_option)
    source = find_network(f"{option_prefix}clip", clip)
    config = load_config(source)
    if config.model_type == "clip":
        # the vision part stores a projection_dim of its own, which CLIPModel does not use
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
    if config.model_type != "clip_vision_model":
        raise source.error(f"a {config.model_type!r} network", "use a CLIP")
    width = layers[0].in_features
    if config.projection_dim != width:
        raise ValueError(
            f"{head_option} reads embeddings of {width} numbers but {source.option} {clip!r} gives "
            f"{config.projection_dim}; use the CLIP that the head was trained on"
        )
    network, _ = load_network(source, "CLIPVisionModelWithProjection", config)
    processor = load_processor(source) or _clip_processor(source, config.image_size)
    layers.to(device)

    def read(output: Any) -> Tensor:
        rating: Tensor = layers(F.normalize(output.image_embeds, dim=-1))
        return rating

    ratings = HubNetwork(source, network, processor, read, device=device, batch_size=batch_size)

    def reward(images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        return ratings(images).squeeze(1)

    return reward


def _clip_processor(source: Source, side: int) -> Any:
    """The processor of a CLIP that was saved without one: CLIP's own, at the network's size."""
    square = {"height": side, "width": side}
    transformers = import_transformers(source.option, source.value)
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)


def load_head(head: Any, option: str) -> Any:
    """Read the weights of a head; no code in the file is run. `option` names the head in errors.

    Raises:
        ValueError: no such file here or on the hub, not of a known kind, or a pickle that holds more than tensors.
    """
    path = find_file(option, head)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"{option} is {head!r}; use a .safetensors, .pth or .pt file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{option} is {head!r}, a pickle that holds more than tensors and is not run; "
            "save its state_dict() as .safetensors"
        ) from None
    except Exception as error:
        raise ValueError(
            f"{option} is {head!r}, which does not load: {first_line(error)}; download the file again"
        ) from error


def build_head(weights: Any, head: str, option: str) -> nn.Sequential:
    """The linear layers of a head, by the layout of its weights: "weight", "bias" (v1) or "layers.0.weight"… (v2).

    Raises:
        ValueError: any other layout, a head with activations included; or a number that is not finite.
    """
    tensors = weights if isinstance(weights, Mapping) else {}
    present = {name: tuple(getattr(value, "shape", ())) for name, value in tensors.items()}
    for prefixes, widths in HEADS.items():
        names = [f"{prefix}{kind}" for prefix in prefixes for kind in ("weight", "bias")]
        if set(tensors) != set(names):
            continue
        inputs = (*present[names[0]][-1:], *widths)
        shapes = [shape for i, o in zip(inputs, widths, strict=False) for shape in ((o, i), (o,))]
        if [present[name] for name in names] != shapes:
            break
        if problem := not_finite(tensors):
            raise ValueError(f"{option} is {head!r}, whose weights can't be used: {problem}; download the file again")
        layers = nn.Sequential(*(nn.Linear(i, o) for i, o in zip(inputs, widths, strict=False)))
        layers.load_state_dict(dict(zip(layers.state_dict(), (tensors[name].float() for name in names), strict=True)))
        return layers.eval().requires_grad_(False)
    layout = {name: list(shape) for name, shape in list(present.items())[:12]}
    raise ValueError(
        f"{option} {head!r} is not a LAION head: its weights are {layout or type(weights).__name__}; expected "
        "weight [1, D] and bias [1], or layers.{0,2,4,6,7} of widths 1024, 128, 64, 16, 1 (no activations)"
    )
