"""FLUX.1: a transformer of flow matching on packed latents, steered by CLIP and T5, with guidance as an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hrf_fast.policies.base import Condition
from hrf_fast.policies.calling import Layout, timestep_rows
from hrf_fast.policies.encoders import PromptEncoder, Rows
from hrf_fast.policies.families.base import Family, PartConfig, PartConfigs
from hrf_fast.policies.families.checks import check_transformer
from hrf_fast.policies.text_to_image import TextToImagePolicy
from hrf_fast.prompts import Prompt


def call_flux(
    transformer: Any,
    latents: Tensor,
    timesteps: float | Tensor,
    inputs: Mapping[str, Tensor],
    *,
    grid: tuple[int, int],
) -> Tensor:
    """Call a FluxTransformer2DModel, which takes σ and positions, on packed latents [B, tokens, C].

    Args:
        grid: rows and columns of the tokens.
    """
    rows, columns = (torch.arange(count, dtype=torch.float32, device=latents.device) for count in grid)
    places = torch.cartesian_prod(rows, columns)
    output: Tensor = transformer(
        hidden_states=latents,
        timestep=timestep_rows(timesteps, latents) / 1000,
        img_ids=torch.cat([torch.zeros_like(places[:, :1]), places], dim=1),
        txt_ids=torch.zeros(inputs["encoder_hidden_states"].shape[1], 3, device=latents.device),
        return_dict=False,
        **inputs,
    )[0]
    return output


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The latents [B, C, h, w] of FLUX's tokens [B, h/2·w/2, 4·C]."""
    rows, columns = grid
    patches = tokens.view(len(tokens), rows, columns, tokens.shape[-1] // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, 2 * rows, 2 * columns)


class FluxPolicy(TextToImagePolicy):
    """The policy of a FluxPipeline, whose latents are tokens and whose guidance is an input of the network."""

    has_unconditional_branch = False

    def condition(self, prompts: Sequence[Prompt | None], *, guided: bool = True) -> Condition:
        """The embeddings of prompts and, for a transformer that takes it, the guidance scale: 1 if not `guided`.

        There is no unconditional branch: a negative prompt has no effect.
        """
        rows = self._encoder.rows([(prompt or Prompt("")).text for prompt in prompts])
        if self.unet.config.guidance_embeds:
            scale = self.guidance_scale if guided else 1.0
            rows["guidance"] = torch.full((len(prompts),), scale, device=self.device)
        return Condition(rows)

    def _unscaled(self, latents: Tensor) -> Tensor:
        assert self.shape.grid is not None
        return super()._unscaled(unpack(latents, self.shape.grid))


class PromptEncoderFlux(PromptEncoder):
    """The text encoders of FLUX: the hidden states of T5, and what CLIP has pooled."""

    def _output(self, number: int, text: str) -> Sequence[Tensor]:
        return [self._call(1, text, self.t5_length)[0] if number else self._call(0, text).pooler_output]

    def _join(self, outputs: Sequence[Sequence[Tensor]]) -> Rows:
        (pooled,), (hidden,) = outputs
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def zeros(configs: PartConfigs, images: int, guided: bool, t5_length: int) -> Condition:
    """See `Family.zeros`."""
    transformer = configs["transformer"]
    rows = {
        "encoder_hidden_states": torch.zeros(images, t5_length, transformer.get("joint_attention_dim", 4096)),
        "pooled_projections": torch.zeros(images, transformer.get("pooled_projection_dim", 768)),
    }
    if transformer.get("guidance_embeds", False):
        rows["guidance"] = torch.zeros(images)
    return Condition(rows)


def check(name: str, configs: PartConfigs) -> None:
    """Refuse a transformer whose inputs are not what the VAE and the text encoders make."""
    check_transformer(name, configs, channels=64, patch=4, pooled="hidden_size", pooled_width=768)


def check_guidance(name: str, denoiser: PartConfig, guidance_scale: float) -> None:
    """Refuse guidance for a FLUX whose transformer does not take it."""
    if guidance_scale != 1 and not denoiser.get("guidance_embeds", False):
        raise ValueError(
            f"sample.guidance_scale is {guidance_scale} but model.name is {name!r}, a FLUX that was distilled "
            "without guidance (guidance_embeds: false, as FLUX.1-schnell); leave it at 1, or use FLUX.1-dev"
        )


FLUX = Family(
    {
        "transformer": "FluxTransformer2DModel",
        "scheduler": "",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer_2": "T5TokenizerFast",
    },
    # latents of 128 x 128 where nobody says another size, as in its pipeline
    Layout(call_flux, patch=lambda config: 2, tokens=True, packed=True, side=lambda config: 128),
    FluxPolicy,
    check,
    encoder=PromptEncoderFlux,
    zeros=zeros,
    t5_length=512,
    check_guidance=check_guidance,
    ddpm=False,
    flow=True,
    linear_sigmas=True,
)
