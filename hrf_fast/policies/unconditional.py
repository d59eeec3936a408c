"""UnconditionalPolicy: a UNet2DModel as a policy; pixel.py and latent.py say how its latents become images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hrf_fast.policies.base import Condition, Prediction
from hrf_fast.policies.compilation import compile_network
from hrf_fast.policies.network import Network, NetworkCalls
from hrf_fast.policies.sampler import Sampler
from hrf_fast.stopwatch import Stopwatch
from hrf_kernels import choose_backend


class UnconditionalPolicy:
    """The denoising policy π(x_{t-1} | x_t, t) of a UNet2DModel; a subclass adds `decode`, `save` and `example`."""

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        sampler: Sampler,
        *,
        precision: str = "fp32",
        kernels: str = "auto",
        channels_last: bool = False,
    ) -> None:
        """Wrap a UNet2DModel.

        Args:
            scheduler: the model's own, which is saved with it; sampler: the steps made of it.
            precision: fp32, or bf16 or fp16 for autocast with fp32 weights.
            kernels: see `hrf_kernels.choose_backend`.
            channels_last: weights and inputs of the UNet in that memory format.

        Raises:
            ValueError: an unknown precision, or kernels that can't run on the UNet's device.
        """
        self.unet, self.scheduler, self.precision = unet, scheduler, precision
        self.network = Network(unet, precision, channels_last=channels_last)
        self._with_gradient: Callable[..., Tensor] = self.network
        self.device = next(unet.parameters()).device
        try:
            self.kernels, self.kernels_reason = choose_backend(kernels, self.device)
        except ValueError as error:
            raise ValueError(f"HRF_KERNELS is {kernels!r}: {error}") from error
        self.sampler = sampler.to(self.device)
        # a list, so that a step's timestep needs no copy from the device
        self._timesteps: list[int] = sampler.timesteps.tolist()
        self.compiled = "none"
        self.calls = NetworkCalls()
        self.stopwatch = Stopwatch(self.device)
        self.latent_shape: tuple[int, ...] = latent_shape(unet.config)

    def condition(self, prompts: Sequence[str | None]) -> Condition:
        """The empty condition: nothing steers the model."""
        return Condition()

    def predict(self, latents: Tensor, steps: int | Tensor, condition: Condition) -> Prediction:
        """The UNet's output for latents [B, C, H, W] at one step or at [B] steps, counted and timed."""
        timesteps = self._timesteps[steps] if isinstance(steps, int) else self.sampler.timesteps[steps]
        self.calls.batches += 1
        self.calls.forwards += len(latents)
        forward = self._with_gradient if torch.is_grad_enabled() else self.network
        with self.stopwatch.running():
            return Prediction(forward(latents, timesteps, **condition.conditional))

    def attach(self, forward: Callable[..., Tensor]) -> None:
        """Let calls with gradient go through an engine's wrapper of the network; see `Policy.attach`."""
        self._with_gradient = forward

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Panels and checks are no part of what training costs: calls inside are not counted."""
        calls, self.calls = self.calls, NetworkCalls()
        try:
            yield
        finally:
            self.calls = calls

    def blocks(self) -> list[nn.Module]:
        """The down, mid and up blocks."""
        return [*self.unet.down_blocks, *filter(None, [self.unet.mid_block]), *self.unet.up_blocks]

    def compile(self, mode: str) -> None:
        """Run the UNet compiled, see `compile_network`; `warm_up` makes the graphs before training."""
        compile_network({"none": [], "unet": [self.unet], "blocks": self.blocks()}[mode])
        self.compiled, self.network.compiled = mode, mode != "none"


def latent_shape(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) that a UNet2DModel of this configuration takes."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width


def check_finite(latents: Tensor) -> None:
    """Refuse latents that no image is made of.

    Raises:
        FloatingPointError: a latent is NaN or infinite, which the clamp to [0, 1] would hide in part.
    """
    if not torch.isfinite(latents).all():
        raise FloatingPointError(
            "the images are not finite: the model's weights have diverged or were NaN when loaded; lower "
            "optimizer.learning_rate and resume from the last checkpoint, or check model.name"
        )


def saved_scheduler(scheduler: Any) -> Any:
    """The scheduler to save beside a UNet2DModel: a DDIM that does not clip stands for PNDM, which no pipeline runs."""
    from diffusers import DDIMScheduler

    if type(scheduler).__name__ == "PNDMScheduler":
        return DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    return scheduler


def pipeline_example(pipeline: str, scheduler: str, num_inference_steps: int, eta: float) -> str:
    """The lines of `Policy.example` for a pipeline class of diffusers."""
    kind, noise = {"ddim": ("DDIMScheduler", f", eta={eta}"), "ddpm": ("DDPMScheduler", "")}[scheduler]
    return f"""\
import torch
from diffusers import {", ".join(sorted((pipeline, kind)))}

pipeline = {pipeline}.from_pretrained(".")
pipeline.scheduler = {kind}.from_config(pipeline.scheduler.config)
images = pipeline(batch_size=16, num_inference_steps={num_inference_steps}{noise}, output_type="np").images
# [16, 3, height, width] in [0, 1], as rewards see them
images = torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
"""


@contextmanager
def contiguous(module: nn.Module) -> Iterator[None]:
    """Weights in the order that safetensors writes; afterwards they are where and as they were."""
    strided = [(parameter, parameter.data) for parameter in module.parameters() if not parameter.is_contiguous()]
    try:
        for parameter, data in strided:
            parameter.data = data.contiguous()
        yield
    finally:
        for parameter, data in strided:
            parameter.data = data
