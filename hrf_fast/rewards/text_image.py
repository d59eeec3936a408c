"""Rewards that compare an image with its prompt: CLIP, PickScore, HPS and ImageReward.

Each refuses an unconditional model when the run is built. Nothing ships but CLIPs of shipped models: weights come from
the hub or from local paths, and of a .pt file only tensors are read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hrf_fast.hub import find_file, first_line
from hrf_fast.registry import check_count
from hrf_fast.rewards.registry import OPTION_PREFIX, Reward, register_reward
from hrf_fast.vision.base import to_bytes
from hrf_fast.vision.clip import Clip


@register_reward("clip_score", needs="transformers, and a CLIP by hub id or local folder", reads_prompts=True)
def clip_score(
    model: str = "openai/clip-vit-large-patch14",
    batch_size: int = 16,
    *,
    device: torch.device | str = "cpu",
    option_prefix: str = OPTION_PREFIX,
) -> Reward:
    """CLIP score: 100 times the cosine between the embeddings of image and prompt.

    Args:
        model: hub id or local folder of any CLIP of transformers.
        batch_size: images that go through CLIP at once.
    """
    check_count(f"{option_prefix}batch_size", batch_size)
    clip = Clip(f"{option_prefix}model", model, device, batch_size=batch_size)
    return lambda images, prompts=None: 100 * clip.cosines(images, prompts or ())


@register_reward(
    "pickscore", needs="transformers, and PickScore's weights by hub id or local folder", reads_prompts=True
)
def pickscore(
    model: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    batch_size: int = 8,
    *,
    device: torch.device | str = "cpu",
    option_prefix: str = OPTION_PREFIX,
) -> Reward:
    """PickScore (arXiv 2305.01569): the learnt logit scale times the cosine of image and prompt, roughly 15 to 25.

    Args:
        model: hub id or local folder of PickScore's CLIP.
        processor: hub id or local folder of its image settings and tokenizer.
        batch_size: images that go through CLIP at once.
    """
    check_count(f"{option_prefix}batch_size", batch_size)
    clip = Clip(
        f"{option_prefix}model",
        model,
        device,
        batch_size=batch_size,
        processor=(f"{option_prefix}processor", processor),
    )
    return lambda images, prompts=None: clip.logit_scale * clip.cosines(images, prompts or ())


@register_reward("hps", needs='pip install "hrf_fast[hps]", and HPS v2 weights by path or hub', reads_prompts=True)
def hps(
    checkpoint: str = "xswu/HPSv2:HPS_v2.1_compressed.pt",
    architecture: str = "ViT-H-14",
    batch_size: int = 8,
    *,
    device: torch.device | str = "cpu",
    option_prefix: str = OPTION_PREFIX,
) -> Reward:
    """Human Preference Score v2 (arXiv 2306.09341): the cosine of image and prompt under its CLIP, roughly 0.2 to 0.35.

    Args:
        checkpoint: a .pt file, or "owner/repository:filename" on the hub.
        architecture: name of open_clip's configuration that the checkpoint is of.
        batch_size: images that go through CLIP at once.
    """
    check_count(f"{option_prefix}batch_size", batch_size)
    # of the package hpsv2 as pip installs it the tokenizer lacks a file; its CLIP is open_clip's
    open_clip = _package("open_clip", "hps", 'pip install "hrf_fast[hps]"')
    network, _, preprocess = open_clip.create_model_and_transforms(
        architecture, image_resize_mode="longest", image_interpolation="bicubic"
    )
    _load(network, f"{option_prefix}checkpoint", checkpoint, lambda weights: weights.get("state_dict", weights))
    network.to(device)
    tokenize = open_clip.get_tokenizer(architecture)

    def score(pictures: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        pixels = torch.stack([preprocess(picture) for picture in pictures]).to(device)
        embeddings = network.encode_image(pixels), network.encode_text(tokenize(list(prompts)).to(device))
        return F.cosine_similarity(*embeddings)

    return _of_pictures(score, batch_size)


@register_reward("image_reward", needs="the package image-reward, and its weights by path or hub", reads_prompts=True)
def image_reward(
    checkpoint: str = "THUDM/ImageReward:ImageReward.pt",
    text_config: str = "THUDM/ImageReward:med_config.json",
    *,
    device: torch.device | str = "cpu",
    option_prefix: str = OPTION_PREFIX,
) -> Reward:
    """ImageReward (arXiv 2304.05977): a preference learnt on BLIP, standardised, roughly -2 to 2.

    Args:
        checkpoint: a .pt file, or "owner/repository:filename" on the hub.
        text_config: the configuration of its text encoder, likewise.
    """
    way_out = (
        "pip install image-reward; it was written for transformers 4, so where it does not import beside "
        "transformers 5, serve it from an environment of its own and use reward.name=remote (docs/rewards.md)"
    )
    package = _package("ImageReward.ImageReward", "image_reward", way_out)
    network = package.ImageReward(device=device, med_config=str(find_file(f"{option_prefix}text_config", text_config)))
    _load(network, f"{option_prefix}checkpoint", checkpoint, lambda weights: weights)
    network.to(device)

    def score(pictures: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        return torch.tensor([network.score(prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)])

    return _of_pictures(score, 1)


def _of_pictures(score: Callable[[Sequence[Any], Sequence[str]], Tensor], batch_size: int) -> Reward:
    """A reward from a function of pictures of Pillow and prompts, called with `batch_size` of them."""

    def reward(images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        pictures = [Image.fromarray(pixels) for pixels in to_bytes(images).numpy()]
        starts = range(0, len(pictures), batch_size)
        texts = prompts or ()
        return torch.cat([score(pictures[at : at + batch_size], texts[at : at + batch_size]) for at in starts])

    return reward


def _package(module: str, reward: str, way_out: str) -> Any:
    try:
        return importlib.import_module(module)
    # a package that was written for other versions raises anything
    except Exception as error:
        raise ImportError(
            f"reward {reward!r} needs {module.split('.')[0]}, which does not import ({first_line(error)}): {way_out}"
        ) from error


def _load(network: Any, option: str, value: str, read: Callable[[Any], Any]) -> None:
    """Load the weights of a .pt file, without running code in it, and freeze the network.

    Raises:
        ValueError: no such file, one that holds more than tensors, or one of another network.
    """
    path = find_file(option, value)
    try:
        weights = read(torch.load(path, map_location="cpu", weights_only=True))
        # not strict: buffers that are computed anew may be in a file of another version, or not
        absent = network.load_state_dict(weights, strict=False).missing_keys
        if missing := {name for name, _ in network.named_parameters()} & {*absent}:
            raise ValueError(f"it lacks {', '.join(sorted(missing)[:5])}")
    except Exception as error:
        raise ValueError(
            f"{option} is {value!r}, whose weights can't be used: {first_line(error)}; download the file again, or "
            "name another"
        ) from error
    network.float().eval().requires_grad_(False)
