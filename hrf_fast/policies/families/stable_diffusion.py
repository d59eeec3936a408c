"""Stable Diffusion 1, 2 and XL: a UNet2DConditionModel steered by one CLIP or two."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hrf_fast.policies.base import Condition
from hrf_fast.policies.calling import UNET
from hrf_fast.policies.encoders import PromptEncoder, Rows
from hrf_fast.policies.families.base import Family, PartConfig, PartConfigs
from hrf_fast.policies.families.checks import check_size
from hrf_fast.policies.text_to_image import TextToImagePolicy

# settings of a UNet2DConditionModel by which something else than step and prompt steers it
_MORE_CONDITIONS = ("num_class_embeds", "class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type")


class StableDiffusionPolicy(TextToImagePolicy):
    """The policy of a StableDiffusionPipeline."""

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents in the decoder's own units; these pipelines read no shift_factor."""
        return latents / self.decoder.config.scaling_factor


class StableDiffusionXLPolicy(StableDiffusionPolicy):
    """The policy of a StableDiffusionXLPipeline."""

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents in the decoder's own units; SDXL's pipeline alone reads a VAE's mean and std."""
        config = self.decoder.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return super()._unscaled(latents)
        mean, std = (torch.tensor(value, device=latents.device).view(1, -1, 1, 1) for value in (mean, std))
        return latents * std / config.scaling_factor + mean


class PromptEncoderXL(PromptEncoder):
    """The text encoders of SDXL: the penultimate hidden states of both, side by side, and what is pooled by the second.

    Every image is described as uncropped and of the size that the model draws (`time_ids`). An empty negative prompt is
    zeros where model_index.json says so, and else is encoded.
    """

    def negative(self, rows: Rows, texts: Sequence[str]) -> Rows:
        """The inputs of the unconditional branch for B negative prompts, of their rows."""
        if _zero_negative(self._index):
            empty = torch.tensor([not text for text in texts], device=self._device)
            for name in ("encoder_hidden_states", "text_embeds"):
                rows[name][empty] = 0
        return rows

    def _output(self, number: int, text: str) -> Sequence[Tensor]:
        output = self._call(number, text, output_hidden_states=True)
        return [output.hidden_states[-2], *([output.text_embeds] if number else [])]

    def _join(self, outputs: Sequence[Sequence[Tensor]]) -> Rows:
        (first,), (second, pooled) = outputs
        hidden, ids = torch.cat([first, second], dim=-1), time_ids(self._size, (0, 0), self._size)
        return {"encoder_hidden_states": hidden, "text_embeds": pooled, "time_ids": ids[None]}


def time_ids(original: tuple[int, int], corner: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """SDXL's description of an image [6]: (height, width) before cropping, (top, left) of the crop, size as drawn."""
    return torch.tensor([*original, *corner, *target], dtype=torch.float32)


def _zero_negative(index: PartConfig) -> bool:
    """Whether an empty negative prompt is zeros, as SDXL's pipeline has it by default."""
    return bool(index.get("force_zeros_for_empty_prompt", True))


def zeros(configs: PartConfigs, images: int, guided: bool, t5_length: int) -> Condition:
    """See `Family.zeros`."""
    encoders = [config for name, config in configs.items() if name.startswith("text_encoder")]
    length = encoders[0].get("max_position_embeddings", 77)
    width = sum(config.get("hidden_size", 512) for config in encoders)
    rows = {"encoder_hidden_states": torch.zeros(images, length, width)}
    if len(encoders) > 1:
        rows["text_embeds"] = torch.zeros(images, encoders[-1].get("projection_dim", 512))
        rows["time_ids"] = torch.zeros(images, 6)
    return Condition(rows, dict(rows) if guided else {})


def check(name: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a Stable Diffusion whose UNet wants other inputs than latents, a step and the encoders' embeddings.

    Args:
        configs: of unet, vae, text_encoder and, for SDXL, text_encoder_2, as their files have them.
    """
    unet, start = configs["unet"], f"model.name is {name!r}, whose UNet "
    encoders = [config for part, config in configs.items() if part.startswith("text_encoder")]
    channels = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if channels[0] != channels[1]:
        raise ValueError(
            f"{start}takes {channels[0]} channels and returns {channels[1]}: one for inpainting or editing, whose "
            "pictures to begin with nobody draws here; use a text-to-image model"
        )
    if unet.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"{start}takes the guidance scale as an input (time_cond_proj_dim: {unet['time_cond_proj_dim']}) as latent "
            "consistency models do, and has no unconditional branch; use the model that it was distilled from"
        )
    conditions = {key: unet[key] for key in _MORE_CONDITIONS if unet.get(key) is not None}
    xl = len(encoders) > 1
    if unet.get("addition_embed_type") != ("text_time" if xl else None):
        conditions["addition_embed_type"] = unet.get("addition_embed_type")
    if unet.get("attention_type", "default") != "default":
        conditions["attention_type"] = unet["attention_type"]
    for key, value in conditions.items():
        raise ValueError(
            f"{start}is not steered as Stable Diffusion's are ({key}: {value!r}); use a model of Stable Diffusion 1, 2 "
            "or XL"
        )
    if (time := unet.get("time_embedding_type", "positional")) != "positional":
        raise ValueError(
            f"{start}takes noise levels instead of steps (time_embedding_type: {time!r}); use another model"
        )
    latent = configs["vae"].get("latent_channels", 4)
    if latent != channels[0]:
        raise ValueError(f"{start}has {channels[0]} channels but whose VAE {latent}; give the parts of one model")
    _check_widths(start, unet, encoders)
    check_size(name, unet.get("sample_size") if xl else latent_side(unet), unet)


def latent_side(unet: Mapping[str, Any]) -> Any:
    """The sample_size of a UNet as StableDiffusionPipeline has it: at least 64 where diffusers before 0.9 wrote it."""
    size = unet.get("sample_size")
    old = re.match(r"0\.[0-8](?!\d)", str(unet.get("_diffusers_version")))
    return max(size, 64) if old and isinstance(size, int) else size


def _check_widths(start: str, unet: Mapping[str, Any], encoders: list[Mapping[str, Any]]) -> None:
    """Refuse text encoders whose embeddings are not as wide as the UNet takes them."""
    width, needed = sum(config.get("hidden_size", 512) for config in encoders), unet.get("cross_attention_dim", 1280)
    if any(each != width for each in (needed if isinstance(needed, list | tuple) else [needed])):
        raise ValueError(
            f"{start}takes embeddings of {needed} numbers (cross_attention_dim) but whose text encoders make {width}; "
            "give the parts of one model"
        )
    if len(encoders) > 1:
        # six time ids and the pooled embedding of the last encoder
        added = 6 * (unet.get("addition_time_embed_dim") or 0) + encoders[-1].get("projection_dim", 512)
        if unet.get("projection_class_embeddings_input_dim") != added:
            raise ValueError(
                f"{start}has projection_class_embeddings_input_dim "
                f"{unet.get('projection_class_embeddings_input_dim')}, but six time ids and the pooled embedding are "
                f"{added} numbers; use a base model of SDXL (no refiner)"
            )


def unchecked(index: PartConfig) -> dict[str, Any]:
    """Arguments of a StableDiffusionPipeline without its checker of images, which is not loaded."""
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def settings_xl(index: PartConfig) -> dict[str, Any]:
    """Arguments of a StableDiffusionXLPipeline besides its parts."""
    return {"force_zeros_for_empty_prompt": _zero_negative(index)}


_PARTS = {
    "unet": "UNet2DConditionModel",
    "scheduler": "",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
STABLE_DIFFUSION = Family(
    _PARTS,
    replace(UNET, side=latent_side),
    StableDiffusionPolicy,
    check,
    encoder=PromptEncoder,
    zeros=zeros,
    settings=unchecked,
    scheduler={"steps_offset": 1, "clip_sample": False},
)
STABLE_DIFFUSION_XL = replace(
    STABLE_DIFFUSION,
    parts={**_PARTS, "text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"},
    layout=UNET,
    policy=StableDiffusionXLPolicy,
    encoder=PromptEncoderXL,
    settings=settings_xl,
    scheduler={},
)
