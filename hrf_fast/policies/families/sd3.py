"""Stable Diffusion 3 and 3.5: a transformer of flow matching, steered by two CLIPs and T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hrf_fast.policies.base import Condition
from hrf_fast.policies.calling import Layout, timestep_rows
from hrf_fast.policies.encoders import PromptEncoder, Rows
from hrf_fast.policies.families.base import Family, PartConfigs
from hrf_fast.policies.families.checks import check_transformer
from hrf_fast.policies.text_to_image import TextToImagePolicy


def call_sd3(transformer: Any, latents: Tensor, timesteps: float | Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Call an SD3Transformer2DModel on latents [B, C, H, W] at timesteps 1000·σ."""
    output: Tensor = transformer(
        hidden_states=latents, timestep=timestep_rows(timesteps, latents), return_dict=False, **inputs
    )[0]
    return output


class PromptEncoderSD3(PromptEncoder):
    """The text encoders of SD3: hidden states of two CLIPs side by side, then those of T5; the CLIPs' pooled ones.

    Without T5 its hidden states are zeros.
    """

    def _output(self, number: int, text: str) -> Sequence[Tensor]:
        if number == 2:
            return [self._call(number, text, self.t5_length)[0]]
        output = self._call(number, text, self._tokenizers[0].model_max_length, output_hidden_states=True)
        return [output.hidden_states[-2], output.text_embeds]

    def _join(self, outputs: Sequence[Sequence[Tensor]]) -> Rows:
        (first, one), (second, other), *rest = outputs
        hidden = torch.cat([first, second], dim=-1)
        t5 = rest[0][0] if rest else hidden.new_zeros(1, self.t5_length, self._denoiser["joint_attention_dim"])
        hidden = torch.cat([pad(hidden, (0, t5.shape[-1] - hidden.shape[-1])), t5], dim=-2)
        return {"encoder_hidden_states": hidden, "pooled_projections": torch.cat([one, other], dim=-1)}


def zeros(configs: PartConfigs, images: int, guided: bool, t5_length: int) -> Condition:
    """See `Family.zeros`."""
    transformer, tokens = configs["transformer"], configs["text_encoder"].get("max_position_embeddings", 77) + t5_length
    rows = {
        "encoder_hidden_states": torch.zeros(images, tokens, transformer.get("joint_attention_dim", 4096)),
        "pooled_projections": torch.zeros(images, transformer.get("pooled_projection_dim", 2048)),
    }
    return Condition(rows, dict(rows) if guided else {})


def check(name: str, configs: PartConfigs) -> None:
    """Refuse a transformer whose inputs are not what the VAE and the text encoders make."""
    clips = check_transformer(name, configs, channels=16, patch=1, pooled="projection_dim", pooled_width=2048)
    joint, side = configs["transformer"].get("joint_attention_dim", 4096), sum(c.get("hidden_size", 512) for c in clips)
    if side > joint:
        raise ValueError(
            f"model.name is {name!r}, whose transformer has joint_attention_dim: {joint} but whose two CLIPs make "
            f"{side}; give the parts of one model"
        )


STABLE_DIFFUSION_3 = Family(
    {
        "transformer": "SD3Transformer2DModel",
        "scheduler": "",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer_2": "CLIPTokenizer",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer_3": "T5TokenizerFast",
    },
    Layout(call_sd3, patch=lambda config: int(config["patch_size"]), tokens=True),
    TextToImagePolicy,
    check,
    encoder=PromptEncoderSD3,
    zeros=zeros,
    t5_length=256,
    ddpm=False,
    flow=True,
)
