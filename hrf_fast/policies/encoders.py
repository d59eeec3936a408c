"""Encoders: prompts as a denoiser takes them, encoded as diffusers' pipelines do (`encode_prompt`).

Those of SDXL, SD3 and FLUX are in families/. A text is padded to a length, or cut to it. Texts are encoded one at a
time, so that an embedding does not depend on what else is asked for, and are remembered on the CPU. Left out: clip_skip
and textual inversion.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# bytes of embeddings that are remembered: a text has 0.6 MB for SDXL and 8 MB for FLUX
_REMEMBERED = 2**30
Rows = dict[str, Tensor]


class PromptEncoder:
    """The text encoder of Stable Diffusion 1 and 2: the last hidden states of one CLIPTextModel."""

    def __init__(
        self,
        tokenizers: Sequence[Any],
        encoders: Sequence[Any],
        device: torch.device,
        *,
        denoiser: Mapping[str, Any],
        size: tuple[int, int],
        index: Mapping[str, Any],
        t5_length: int,
        offload: bool,
    ) -> None:
        """Freeze the encoders.

        Args:
            tokenizers, encoders: in pairs, transformers' own; the encoders in fp32 or bf16.
            denoiser: config of the denoiser; size: height and width of images; index: values of model_index.json.
            t5_length: tokens of T5 for a prompt, if there is T5.
            offload: keep the encoders on the CPU between uses.
        """
        self.t5_length = t5_length
        self._denoiser, self._size, self._index = denoiser, size, index
        self._tokenizers, self._device, self._offload = tokenizers, device, offload
        self.encoders = nn.ModuleList(encoders).eval().requires_grad_(False).to("cpu" if offload else device)
        self._remembered: dict[str, Rows] = {}
        self._cut: set[tuple[int, str]] = set()

    def rows(self, texts: Sequence[str]) -> Rows:
        """The UNet's inputs [B, …] for B texts on the device, by their names, without gradient."""
        return self.stacked(self.encode(texts), texts)

    def stacked(self, known: Mapping[str, Rows], texts: Sequence[str]) -> Rows:
        """The rows [B, …] of B texts on the device, of those that `encode` has returned."""
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        index = torch.tensor([distinct[text] for text in texts], device=self._device)
        first = next(iter(known.values()))
        return {name: torch.cat([known[t][name] for t in distinct]).to(self._device)[index] for name in first}

    def encode(self, texts: Sequence[str]) -> dict[str, Rows]:
        """The rows [1, …] of each distinct text on the CPU, remembered or made."""
        known = {text: self._remembered.get(text, {}) for text in texts}
        if new := [text for text, rows in known.items() if not rows]:
            with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                known |= self._encode(new)
        self._remember(known)
        return known

    def negative(self, rows: Rows, texts: Sequence[str]) -> Rows:
        """The inputs of the unconditional branch for B negative prompts, of their rows."""
        return rows

    def _remember(self, rows: dict[str, Rows]) -> None:
        """Keep rows as the last used, and drop those that were not used for longest."""
        self._remembered = {text: row for text, row in self._remembered.items() if text not in rows} | rows
        room = _REMEMBERED
        for text, row in reversed([*self._remembered.items()]):
            room -= sum(tensor.nbytes for tensor in row.values())
            if room < 0:
                del self._remembered[text]

    def _encode(self, texts: Sequence[str]) -> dict[str, Rows]:
        """The rows [1, …] of each text, on the CPU. With `offload` one encoder at a time is on the device."""
        outputs = []
        for number, encoder in enumerate(self.encoders):
            with resident(encoder, self._device, self._offload):
                of_encoder = [[part.to("cpu", torch.float32) for part in self._output(number, text)] for text in texts]
            outputs.append(of_encoder)
        return {text: self._join(parts) for text, *parts in zip(texts, *outputs, strict=True)}

    def _output(self, number: int, text: str) -> Sequence[Tensor]:
        """The tensors [1, …] of an encoder's output for one text that its rows are made of."""
        return [self._call(number, text)[0]]

    def _join(self, outputs: Sequence[Sequence[Tensor]]) -> Rows:
        """The rows [1, …] of one text, of the outputs of each encoder."""
        return {"encoder_hidden_states": outputs[0][0]}

    def _call(self, number: int, text: str, length: int | None = None, **options: Any) -> Any:
        """The output of an encoder for a text of `length` tokens; None for the tokenizer's own."""
        tokenizer, encoder = self._tokenizers[number], self.encoders[number]
        length = length or tokenizer.model_max_length
        tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        self._note_cut(tokenizer, text, length)
        mask = tokens.attention_mask.to(self._device) if getattr(encoder.config, "use_attention_mask", False) else None
        return encoder(tokens.input_ids.to(self._device), attention_mask=mask, **options)

    def _note_cut(self, tokenizer: Any, text: str, length: int) -> None:
        """Warn of a text that is longer than an encoder takes, once for each length."""
        ids = tokenizer(text, verbose=False).input_ids
        if len(ids) <= length or (length, text) in self._cut:
            return
        self._cut.add((length, text))
        # the last token that fits is the end of the text
        dropped = tokenizer.decode(ids[length - 1 : -1])
        warnings.warn(
            f"the prompt {text!r} has {len(ids)} tokens and the text encoder takes {length}: {dropped!r} is cut off",
            stacklevel=2,
        )


@contextmanager
def resident(module: nn.Module, device: torch.device, offload: bool) -> Iterator[None]:
    """A block in which a frozen module is on the device; with `offload` it is back on the CPU afterwards."""
    on_cpu = [(parameter, parameter.data) for parameter in module.parameters()] if offload else []
    try:
        if offload:
            module.to(device)
        yield
    finally:
        # not copied back: nothing has changed them
        for parameter, data in on_cpu:
            parameter.data = data
        if offload:
            module.to("cpu")
