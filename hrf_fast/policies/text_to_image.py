"""TextToImagePolicy: models steered by prompts, in the latents of a VAE: Stable Diffusion 1, 2, XL and 3, and FLUX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrf_fast.policies.base import Condition
from hrf_fast.policies.denoiser import DenoiserPolicy, check_finite, contiguous, decode_in_parts, scheduler_of
from hrf_fast.policies.encoders import PromptEncoder, resident
from hrf_fast.policies.lora import adapted_layers, save_adapters
from hrf_fast.policies.parts import quiet
from hrf_fast.policies.sampler import Sampler
from hrf_fast.prompts import Prompt

# pixels that the decoder makes at once: its activations are those of full-size images
_PIXELS_AT_ONCE = 8 * 256 * 256


def decoded_at_once(size: tuple[int, int]) -> int:
    """Images of a height and width that are decoded in one call."""
    return max(1, _PIXELS_AT_ONCE // math.prod(size))


class TextToImagePolicy(DenoiserPolicy):
    """The policy of a pipeline that takes prompts; its denoiser alone is trained."""

    takes_prompts = True
    has_unconditional_branch = True
    decoder: Any

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        sampler: Sampler,
        encoder: PromptEncoder,
        decoder: Any,
        *,
        pipeline: str,
        parts: Mapping[str, Any],
        denoiser: str = "unet",
        decoder_name: str | None = None,
        sized: bool = False,
        offload: bool = False,
        **options: Any,
    ) -> None:
        """Add what prompts go through and what images come from.

        Args:
            encoder: of prompts; decoder: an AutoencoderKL or AutoencoderTiny.
            pipeline: the class that `save` writes; parts: what it is made of besides the denoiser and the scheduler.
            denoiser: the denoiser's name among the pipeline's parts, unet or transformer.
            decoder_name: model.decoder, where the decoder is not the pipeline's VAE.
            sized: whether the images have a size of the user's, which the lines of `example` name.
            offload: keep the decoder on the CPU between uses.
            options: DenoiserPolicy's.
        """
        super().__init__(unet, scheduler, sampler, **options)
        self._encoder, self._parts, self._pipeline, self._denoiser = encoder, parts, pipeline, denoiser
        self._decoder_name, self._sized, self.offload = decoder_name, sized, offload
        self.decoder = decoder.eval().requires_grad_(False).to("cpu" if offload else self.device)
        assert self.shape.size is not None
        self.decoded_at_once = decoded_at_once(self.shape.size)

    def condition(self, prompts: Sequence[Prompt | None], *, guided: bool = True) -> Condition:
        """The embeddings of prompts and, under guidance, of their negative prompts; None is the empty prompt."""
        chosen = [prompt or Prompt("") for prompt in prompts]
        texts, negatives = [prompt.text for prompt in chosen], [prompt.negative for prompt in chosen]
        if not guided or self.guidance_scale == 1:
            return Condition(self._encoder.rows(texts))
        # both at once: encoders that are offloaded come to the device for it
        known = self._encoder.encode([*texts, *negatives])
        positive, negative = (self._encoder.stacked(known, of) for of in (texts, negatives))
        return Condition(positive, self._encoder.negative(negative, negatives))

    @property
    def visiting_bytes(self) -> int:  # type: ignore[override]
        """Bytes of the largest text encoder, where one at a time comes to the device for its work; else 0."""
        sizes = [sum(weight.nbytes for weight in each.parameters()) for each in self._encoder.encoders]
        return max(sizes) if self.offload else 0

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents [B, …] in fp32 to images [B, 3, H, W] in [0, 1], as the pipelines do.

        Raises:
            FloatingPointError: a latent is NaN or infinite.
        """
        check_finite(latents)
        latents = self._unscaled(latents.float())
        with resident(self.decoder, self.device, self.offload):
            return decode_in_parts(self.decoder, latents, self.decoded_at_once)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] in the decoder's own units."""
        config = self.decoder.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def save(self, folder: Path) -> None:
        """Write a diffusers folder (safetensors) with every part, which the pipeline's `from_pretrained` loads.

        Of a denoiser with adapters only these are written, for `load_lora_weights`.
        """
        # advice and bars, among the JSON lines of a run
        with quiet():
            kind = self.saved_as(self._pipeline, self.scheduler)
            if adapted_layers(self.unet):
                save_adapters(self.unet, folder, kind)
                return
            with contiguous(self.unet):
                pipeline = kind(**{self._denoiser: self.unet}, scheduler=self.scheduler, **self._parts)
                pipeline.save_pretrained(folder, safe_serialization=True)
            for name, part in self._parts.items():
                if type(part).__name__.startswith("CLIPTokenizer"):
                    # vocab.json and merges.txt, which transformers 4 reads; 5 writes tokenizer.json alone
                    part.backend_tokenizer.model.save(str(folder / name))

    def example(
        self, scheduler: str, num_inference_steps: int, eta: float, base: str = '"."', negative: str = ""
    ) -> str:
        """See `Policy.example`."""
        adapted = bool(adapted_layers(self.unet))
        source, adapters = (base, 'pipeline.load_lora_weights(".")\n') if adapted else ('"."', "")
        # diffusers wants to hear of text encoders that are not there
        absent = [name for name, part in self._parts.items() if part is None and name.startswith(("text_", "token"))]
        source = ", ".join([source, *(f"{name}=None" for name in absent)])
        kind, options, noise = scheduler_of(scheduler, eta, self.scheduler.config if adapted else None)
        names = sorted((self._pipeline, kind, *(["AutoencoderTiny"] if self._decoder_name else [])))
        tiny = f'pipeline.vae = AutoencoderTiny.from_pretrained("{self._decoder_name}")\n' if self._decoder_name else ""
        arguments = ""
        if negative and self.has_unconditional_branch and self.guidance_scale > 1:
            arguments += f"\n    negative_prompt={negative!r},"
        arguments += f"\n    {noise.removeprefix(', ')}," if noise else ""
        if self._encoder.t5_length:
            arguments += f"\n    max_sequence_length={self._encoder.t5_length},"
        if self._sized and self.shape.size:
            arguments += "\n    height={},\n    width={},".format(*self.shape.size)
        return f"""\
import torch
from diffusers import {", ".join(names)}

pipeline = {self._pipeline}.from_pretrained({source})
{adapters}pipeline.scheduler = {kind}.from_config(pipeline.scheduler.config{options})
{tiny}images = pipeline(
    "your prompt",
    num_images_per_prompt=16,
    num_inference_steps={num_inference_steps},
    guidance_scale={self.guidance_scale},{arguments}
    output_type="np",
).images
# [16, 3, height, width] in [0, 1], as rewards see them
images = torch.from_numpy(images).permute(0, 3, 1, 2)
"""
