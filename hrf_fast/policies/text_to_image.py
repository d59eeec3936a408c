"""StableDiffusionPolicy: Stable Diffusion 1, 2 (v-prediction too) and XL, steered by prompts, in the VAE's latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrf_fast.policies.base import Condition
from hrf_fast.policies.encoders import PromptEncoder, resident
from hrf_fast.policies.files import STABLE_DIFFUSION
from hrf_fast.policies.lora import adapted_layers, save_adapters
from hrf_fast.policies.parts import quiet
from hrf_fast.policies.sampler import Sampler
from hrf_fast.policies.unet import UNetPolicy, check_finite, contiguous, scheduler_of
from hrf_fast.prompts import Prompt

# pixels that the decoder makes at once: its activations are those of full-size images
_PIXELS_AT_ONCE = 8 * 256 * 256


class StableDiffusionPolicy(UNetPolicy):
    """The policy of a StableDiffusionPipeline or StableDiffusionXLPipeline; its UNet alone is trained."""

    takes_prompts = True

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
        decoder_name: str | None = None,
        offload: bool = False,
        **options: Any,
    ) -> None:
        """Add what prompts go through and what images come from.

        Args:
            encoder: of prompts; decoder: an AutoencoderKL or AutoencoderTiny.
            pipeline: the class that `save` writes; parts: what it is made of besides the UNet and the scheduler.
            decoder_name: model.decoder, where the decoder is not the pipeline's VAE.
            offload: keep the decoder on the CPU between uses.
            options: UNetPolicy's.
        """
        super().__init__(unet, scheduler, sampler, **options)
        self._encoder, self._parts, self._pipeline = encoder, parts, pipeline
        self._decoder_name, self._offload = decoder_name, offload
        self.decoder = decoder.eval().requires_grad_(False).to("cpu" if offload else self.device)
        _, height, width = self.latent_shape
        factor = 2 ** (len(decoder.config.block_out_channels) - 1)
        self._decoded_at_once = max(1, _PIXELS_AT_ONCE // (height * width * factor**2))

    def condition(self, prompts: Sequence[Prompt | None], *, guided: bool = True) -> Condition:
        """The embeddings of prompts and, under guidance, of their negative prompts; None is the empty prompt."""
        chosen = [prompt or Prompt("") for prompt in prompts]
        conditional = self._encoder.rows([prompt.text for prompt in chosen])
        if not guided or self.guidance_scale == 1:
            return Condition(conditional)
        return Condition(conditional, self._encoder.negative_rows([prompt.negative for prompt in chosen]))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents [B, 4, h, w] in fp32 to images [B, 3, H, W] in [0, 1], as the pipelines do.

        Raises:
            FloatingPointError: a latent is NaN or infinite.
        """
        check_finite(latents)
        latents = self._unscaled(latents.float())
        with resident(self.decoder, self.device, self._offload), torch.autocast(latents.device.type, enabled=False):
            images = torch.cat([self.decoder.decode(part).sample for part in latents.split(self._decoded_at_once)])
        return (images / 2 + 0.5).clamp(0, 1)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents in the decoder's own units; SDXL's pipeline alone reads a VAE's mean and std."""
        config = self.decoder.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if self._pipeline == STABLE_DIFFUSION or mean is None or std is None:
            return latents / config.scaling_factor
        mean, std = (torch.tensor(value, device=latents.device).view(1, -1, 1, 1) for value in (mean, std))
        return latents * std / config.scaling_factor + mean

    def save(self, folder: Path) -> None:
        """Write a diffusers folder (safetensors) with every part, which the pipeline's `from_pretrained` loads.

        Of a UNet with adapters only these are written, for `load_lora_weights`.
        """
        import diffusers

        # advice and bars, among the JSON lines of a run
        with quiet():
            kind = getattr(diffusers, self._pipeline)
            if adapted_layers(self.unet):
                save_adapters(self.unet, folder, kind)
                return
            with contiguous(self.unet):
                pipeline = kind(unet=self.unet, scheduler=self.scheduler, **self._parts)
                pipeline.save_pretrained(folder, safe_serialization=True)
            for name, part in self._parts.items():
                if name.startswith("tokenizer"):
                    # vocab.json and merges.txt, which transformers 4 reads; 5 writes tokenizer.json alone
                    part.backend_tokenizer.model.save(str(folder / name))

    def example(self, scheduler: str, num_inference_steps: int, eta: float, base: str = '"."') -> str:
        """See `Policy.example`."""
        source, adapters = ('"."', "") if not adapted_layers(self.unet) else (base, 'pipeline.load_lora_weights(".")\n')
        kind, options, noise = scheduler_of(scheduler, eta)
        names = sorted((self._pipeline, kind, *(["AutoencoderTiny"] if self._decoder_name else [])))
        tiny = f'pipeline.vae = AutoencoderTiny.from_pretrained("{self._decoder_name}")\n' if self._decoder_name else ""
        arguments = f"\n    {noise.removeprefix(', ')}," if noise else ""
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
