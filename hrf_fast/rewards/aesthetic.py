"""LAION aesthetic score: how much people like a picture, from 1 to 10, by a linear map of its CLIP embedding.

Two published heads load, told apart by their weights: the first predictor (one linear layer) and the improved one (five
linear layers with dropout between them and no activation), which DDPO trains on. Both read the L2-normalised image
embedding of CLIP ViT-L/14. Heads with activations are refused: their file does not say which.
Nothing ships with the package: weights come from the hub or from local paths.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hrf_fast.rewards.pretrained import (
    Preprocessor,
    check_batch_size,
    check_text,
    fetch,
    load_config,
    load_network,
    read_preprocessor,
    unavailable,
)
from hrf_fast.rewards.registry import Reward, register_reward, require

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
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
) -> Reward:
    """LAION aesthetic score of the image, roughly 1 to 10: CLIP embedding, then a linear or five-layer head.

    Args:
        clip: hub id or local folder of the CLIP that the head was trained on (ViT-L/14 for the published heads).
        head: a .safetensors, .pth or .pt file, or "owner/repository:filename" on the hub.
        batch_size: images that go through CLIP at once.
    """
    check_batch_size("aesthetic.batch_size", batch_size)
    check_text("aesthetic.clip", clip, "a hub id or a local folder")
    check_text("aesthetic.head", head, 'a local file or "owner/repository:filename"')
    layers = build_head(load_head(head), head)
    config = load_config("aesthetic.clip", clip)
    if config.model_type == "clip":
        # the vision part stores a projection_dim of its own, which CLIPModel does not use
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
    if config.model_type != "clip_vision_model":
        raise ValueError(f"aesthetic.clip is {clip!r}, a {config.model_type!r} network; use a CLIP")
    width = layers[0].in_features
    if config.projection_dim != width:
        raise ValueError(
            f"aesthetic.head reads embeddings of {width} numbers but aesthetic.clip {clip!r} gives "
            f"{config.projection_dim}; use the CLIP that the head was trained on"
        )
    transformers = require("transformers", reward="aesthetic")
    network = load_network("aesthetic.clip", clip, transformers.CLIPVisionModelWithProjection, config, device)
    settings = read_preprocessor("aesthetic.clip", clip)
    if settings is None:
        side = config.image_size
        preprocess = Preprocessor(side, (side, side), CLIP_MEAN, CLIP_STD)
    else:
        # keys that old files leave out mean what they mean in transformers' CLIP image processor
        defaults = {"resample": 3, "do_center_crop": True, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
        preprocess = Preprocessor.from_settings(defaults | settings, "aesthetic.clip")
    return _Aesthetic(network, layers.to(device), preprocess, batch_size)


class _Aesthetic:
    """Images [B, 3, H, W] in [0, 1] -> [B] fp32."""

    def __init__(self, clip: nn.Module, head: nn.Module, preprocess: Preprocessor, batch_size: int) -> None:
        self._clip = clip
        self._head = head
        self._preprocess = preprocess
        self._batch_size = batch_size
        self._device = next(clip.parameters()).device

    def __call__(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        scores = []
        for chunk in images.to(self._device).split(self._batch_size):
            embedding = self._clip(pixel_values=self._preprocess(chunk)).image_embeds
            scores.append(self._head(F.normalize(embedding, dim=-1)).squeeze(1))
        return torch.cat(scores)


def load_head(head: str) -> Any:
    """Read the weights of a head; no code in the file is run.

    Raises:
        ValueError: not a file of a known kind, or a pickle that holds more than tensors.
        OSError: no such file, here or on the hub.
    """
    path = Path(head).expanduser()
    if not path.is_file():
        repo, colon, filename = head.partition(":")
        if not colon or repo.count("/") != 1 or repo.startswith((".", "/", "~")):
            raise FileNotFoundError(
                f'aesthetic.head is {head!r}, which is neither a file nor "owner/repository:filename"; '
                "give the path of a .safetensors, .pth or .pt file"
            )
        fetched = fetch("aesthetic.head", repo, filename)
        if fetched is None:
            raise FileNotFoundError(f"aesthetic.head is {head!r}, but the repository {repo!r} has no {filename!r}")
        path = fetched
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"aesthetic.head is {head!r}; use a .safetensors, .pth or .pt file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"aesthetic.head is {head!r}, a pickle that holds more than tensors and is not run; "
            "save its state_dict() as .safetensors"
        ) from None
    except Exception as error:
        raise unavailable("aesthetic.head", head, error) from None


def build_head(weights: Any, head: str) -> nn.Sequential:
    """The linear layers of a head, by the layout of its weights: "weight", "bias" (v1) or "layers.0.weight"… (v2).

    Raises:
        ValueError: any other layout, a head with activations included.
    """
    tensors = weights if isinstance(weights, Mapping) else {}
    for prefixes, widths in HEADS.items():
        names = [f"{prefix}{kind}" for prefix in prefixes for kind in ("weight", "bias")]
        if set(tensors) != set(names):
            continue
        inputs = (tensors[names[0]].shape[-1], *widths)
        shapes = [shape for i, o in zip(inputs, widths, strict=False) for shape in ((o, i), (o,))]
        if [tuple(tensors[name].shape) for name in names] != shapes:
            break
        layers = nn.Sequential(*(nn.Linear(i, o) for i, o in zip(inputs, widths, strict=False)))
        layers.load_state_dict(dict(zip(layers.state_dict(), (tensors[name].float() for name in names), strict=True)))
        return layers.eval().requires_grad_(False)
    found = {name: list(getattr(value, "shape", [])) for name, value in list(tensors.items())[:12]}
    raise ValueError(
        f"aesthetic.head {head!r} is not a LAION head: its weights are {found or type(weights).__name__}; expected "
        "weight [1, D] and bias [1], or layers.{0,2,4,6,7} of widths 1024, 128, 64, 16, 1 (no activations)"
    )
