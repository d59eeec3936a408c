"""Encoders of SD3 and FLUX: CLIP's beside T5's, encoded as diffusers' pipelines do (`encode_prompt`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hrf_fast.policies.encoders import PromptEncoder, Rows

# tokens of T5, as the pipelines have them by default (max_sequence_length)
LENGTH_SD3, LENGTH_FLUX = 256, 512


class PromptEncoderSD3(PromptEncoder):
    """The text encoders of SD3: hidden states of two CLIPs side by side, then those of T5; the CLIPs' pooled ones.

    Without T5 its hidden states are zeros.
    """

    def __init__(
        self, tokenizers: Sequence[Any], encoders: Sequence[Any], device: torch.device, *, width: int, **options: Any
    ) -> None:
        """Freeze the encoders.

        Args:
            tokenizers, encoders: two CLIPs, and T5 unless the pipeline lacks it.
            width: of the transformer's text tokens (joint_attention_dim).
        """
        super().__init__(tokenizers, encoders, device, **options)
        self._width = width

    def _encode(self, text: str) -> Rows:
        length = self._tokenizers[0].model_max_length
        clips = [self._call(number, text, length, output_hidden_states=True) for number in range(2)]
        hidden = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)
        if len(self.encoders) > 2:
            t5: Tensor = self._call(2, text, LENGTH_SD3)[0]
        else:
            t5 = hidden.new_zeros(1, LENGTH_SD3, self._width)
        hidden = torch.cat([pad(hidden, (0, t5.shape[-1] - hidden.shape[-1])), t5], dim=-2)
        pooled = torch.cat([output.text_embeds for output in clips], dim=-1)
        rows = {"encoder_hidden_states": hidden, "pooled_projections": pooled}
        return {name: tensor.to("cpu", torch.float32) for name, tensor in rows.items()}


class PromptEncoderFlux(PromptEncoder):
    """The text encoders of FLUX: the hidden states of T5, and what CLIP has pooled."""

    def _encode(self, text: str) -> Rows:
        rows = {
            "encoder_hidden_states": self._call(1, text, LENGTH_FLUX)[0],
            "pooled_projections": self._call(0, text).pooler_output,
        }
        return {name: tensor.to("cpu", torch.float32) for name, tensor in rows.items()}
