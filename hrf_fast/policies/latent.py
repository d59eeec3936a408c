"""LatentPolicy: an unconditional latent diffusion model (diffusers' LDMPipeline), whose VQModel makes the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrf_fast.policies.denoiser import check_finite, contiguous, decode_in_parts
from hrf_fast.policies.lora import merged
from hrf_fast.policies.unconditional import UnconditionalPolicy, pipeline_example

# images that the decoder takes at once: its activations are those of full-size images
DECODED_AT_ONCE = 8


class LatentPolicy(UnconditionalPolicy):
    """The policy of an LDMPipeline such as CompVis/ldm-celebahq-256; the VQModel is frozen."""

    decoded_at_once = DECODED_AT_ONCE
    decoder: Any

    def __init__(self, unet: Any, scheduler: Any, sampler: Any, decoder: Any, **options: Any) -> None:
        """Add the decoder, a VQModel on the UNet's device; the other arguments are UnconditionalPolicy's."""
        super().__init__(unet, scheduler, sampler, **options)
        self.decoder = decoder.eval().requires_grad_(False)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents [B, C, h, w] in fp32 to images [B, 3, H, W] in [0, 1], as LDMPipeline does.

        Raises:
            FloatingPointError: a latent is NaN or infinite.
        """
        check_finite(latents)
        latents = latents.float() / self.decoder.config.scaling_factor
        images = decode_in_parts(self.decoder, latents, DECODED_AT_ONCE)
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images

    def save(self, folder: Path) -> None:
        """Write a diffusers folder (safetensors) that `LDMPipeline.from_pretrained` loads and runs."""
        kind, unet = self.saved_as("LDMPipeline", self.scheduler), merged(self.unet)
        with contiguous(unet):
            pipeline = kind(vqvae=self.decoder, unet=unet, scheduler=self.scheduler)
            pipeline.save_pretrained(folder, safe_serialization=True)

    def example(
        self, scheduler: str, num_inference_steps: int, eta: float, base: str = '"."', negative: str = ""
    ) -> str:
        """See `Policy.example`."""
        return pipeline_example("LDMPipeline", scheduler, num_inference_steps, eta)
