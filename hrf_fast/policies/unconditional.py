"""UnconditionalPolicy: a UNet2DModel as a policy; pixel.py and latent.py say how its latents become images."""

from __future__ import annotations

from collections.abc import Sequence

from hrf_fast.policies.base import Condition
from hrf_fast.policies.denoiser import DenoiserPolicy, scheduler_of
from hrf_fast.prompts import Prompt


class UnconditionalPolicy(DenoiserPolicy):
    """The policy of a UNet2DModel, which nothing steers."""

    def condition(self, prompts: Sequence[Prompt | None], *, guided: bool = True) -> Condition:
        """The empty condition: nothing steers the model."""
        return Condition()


def pipeline_example(pipeline: str, scheduler: str, num_inference_steps: int, eta: float) -> str:
    """The lines of `Policy.example` for a pipeline class of diffusers."""
    kind, options, noise = scheduler_of(scheduler, eta)
    return f"""\
import torch
from diffusers import {", ".join(sorted((pipeline, kind)))}

pipeline = {pipeline}.from_pretrained(".")
pipeline.scheduler = {kind}.from_config(pipeline.scheduler.config{options})
images = pipeline(batch_size=16, num_inference_steps={num_inference_steps}{noise}, output_type="np").images
# [16, 3, height, width] in [0, 1], as rewards see them
images = torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
"""
