"""PixelPolicy: an unconditional DDPM, DDIM or flow model whose latents are the pixels themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from hrf_fast.policies.denoiser import check_finite, contiguous
from hrf_fast.policies.lora import merged
from hrf_fast.policies.parts import import_pipeline
from hrf_fast.policies.unconditional import UnconditionalPolicy, pipeline_example


class PixelPolicy(UnconditionalPolicy):
    """The policy of a DDPMPipeline, DDIMPipeline or PNDMPipeline."""

    def decode(self, latents: Tensor) -> Tensor:
        """Map pixels in [-1, 1] to images [B, 3, H, W] in [0, 1]; a grey channel is repeated.

        Raises:
            FloatingPointError: a pixel is NaN or infinite.
        """
        check_finite(latents)
        images = (latents / 2 + 0.5).clamp(0, 1)
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images

    @staticmethod
    def saved_as(pipeline: str, scheduler: Any) -> Any:
        """A DDIMPipeline for a DDIMScheduler, else a DDPMPipeline."""
        from diffusers import DDIMScheduler

        return import_pipeline("DDIMPipeline" if isinstance(scheduler, DDIMScheduler) else "DDPMPipeline")

    def save(self, folder: Path) -> None:
        """Write a diffusers folder (safetensors) that `DiffusionPipeline.from_pretrained` loads and runs."""
        pipeline, unet = self.saved_as("DDPMPipeline", self.scheduler), merged(self.unet)
        with contiguous(unet):
            pipeline(unet=unet, scheduler=self.scheduler).save_pretrained(folder, safe_serialization=True)

    def example(
        self, scheduler: str, num_inference_steps: int, eta: float, base: str = '"."', negative: str = ""
    ) -> str:
        """See `Policy.example`."""
        pipeline = "DDIMPipeline" if scheduler.startswith("ddim") else "DDPMPipeline"
        return pipeline_example(pipeline, scheduler, num_inference_steps, eta)
