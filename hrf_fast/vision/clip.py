"""Clip: how well images fit texts, by any CLIP of transformers from a shipped name, a folder or the hub."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hrf_fast.assets import ASSETS, SHIPPED
from hrf_fast.hub import find_folder, first_line
from hrf_fast.vision.hub import HubNetwork, find_network, load_config, load_network
from hrf_fast.vision.processor import FILES, Source, import_transformers, load_processor

FOLDERS = {name: ASSETS / name / "clip" for name in SHIPPED if (ASSETS / name / "clip").is_dir()}
"""CLIPs that ship with the package."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


class Clip:
    """A frozen CLIP in fp32."""

    def __init__(
        self,
        option: str,
        value: Any,
        device: torch.device | str,
        *,
        batch_size: int,
        processor: tuple[str, Any] | None = None,
    ) -> None:
        """Load a CLIP.

        Args:
            option, value: the option that names it, for errors, and what it was set to.
            batch_size: images and texts that go through it at once.
            processor: option and value of the folder or hub id of its image settings and tokenizer, if elsewhere.

        Raises:
            ImportError: transformers is not installed.
            ValueError: no such network, not a CLIP, or one without image settings, tokenizer or some weights.
        """
        source = find_network(option, value, FOLDERS, also=TOKENIZER)
        config = load_config(source)
        if config.model_type != "clip":
            raise source.error(f"a {config.model_type!r} network", "use a CLIP of images and texts")
        settings = source
        if processor is not None:
            folder = find_folder(*processor, shipped=FOLDERS, files=(*FILES, *TOKENIZER))
            settings = replace(source, option=processor[0], value=processor[1], folder=folder)
        image_processor = load_processor(settings)
        if image_processor is None:
            raise settings.error(f"whose folder {settings.folder} has no {FILES[0]}", "copy the file there")
        self._tokenizer = _load_tokenizer(settings)
        network: Any = load_network(source, "CLIPModel", config)[0]
        self.logit_scale = float(network.logit_scale.exp())
        """The factor that the network was trained with."""
        self._network = network.to(device)
        self._device, self._batch_size = torch.device(device), batch_size
        self._length = config.text_config.max_position_embeddings

        def read(output: Any) -> Tensor:
            return F.normalize(network.visual_projection(output.pooler_output), dim=-1)

        self._images = HubNetwork(
            source, network.vision_model, image_processor, read, device=device, batch_size=batch_size
        )

    def cosines(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosines [B] fp32 between the embeddings of images [B, 3, H, W] in [0, 1] and of a text for each."""
        unique = list(dict.fromkeys(texts))
        rows = self._texts(unique)[[unique.index(text) for text in texts]]
        return (self._images(images) * rows).sum(1)

    @torch.no_grad()
    def _texts(self, texts: Sequence[str]) -> Tensor:
        """Normalised embeddings [N, D] of texts; what is over the token limit is cut."""
        parts = []
        for start in range(0, len(texts), self._batch_size):
            batch = list(texts[start : start + self._batch_size])
            for text, ids in zip(batch, self._tokenizer(batch)["input_ids"], strict=True):
                if len(ids) > self._length:
                    warnings.warn(f"a prompt of {len(ids)} tokens is cut to {self._length}: {text!r}", stacklevel=2)
            tokens = self._tokenizer(
                batch, padding=True, truncation=True, max_length=self._length, return_tensors="pt"
            ).to(self._device)
            with torch.autocast(self._device.type, enabled=False):
                output = self._network.text_model(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], return_dict=True
                )
                parts.append(F.normalize(self._network.text_projection(output.pooler_output), dim=-1))
        return torch.cat(parts)


def _load_tokenizer(source: Source) -> Any:
    transformers = import_transformers(source.option, source.value)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source.folder), trust_remote_code=False)
        tokenizer(["a"], padding=True)
    # transformers raises nearly anything
    except Exception as error:
        raise source.error(
            f"whose tokenizer does not load: {first_line(error)}", "download its files again, or name another CLIP"
        ) from error
    return tokenizer
