"""Policy: a diffusers UNet with the tables of its sampler. How it is loaded is in load.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from hrf_fast.config.options import PRECISIONS
from hrf_fast.policies.compilation import compile_unet
from hrf_fast.policies.network import NOT_REENTRANT, Network, UNetCalls
from hrf_fast.policies.sampler import Diffusion
from hrf_fast.stopwatch import Stopwatch
from hrf_kernels import choose_backend


class Policy:
    """The denoising policy π(x_{t-1} | x_t, t): the UNet's Gaussian step."""

    # a UNet2DModel: its config and output have types that only diffusers knows
    unet: Any
    trained: Callable[[Tensor, int | Tensor], Tensor]
    """What runs where gradients are wanted: the network, or the engine that shards it."""

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,
        diffusion: Diffusion,
        *,
        precision: str = "fp32",
        kernels: str = "auto",
        channels_last: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"compute.precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
        self.unet, self.scheduler, self.precision = unet, scheduler, precision
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        self.network = self.trained = Network(unet, precision, channels_last=channels_last)
        self.device = next(unet.parameters()).device
        try:
            self.kernels, self.kernels_reason = choose_backend(kernels, self.device)
        except ValueError as error:
            raise ValueError(f"HRF_KERNELS is {kernels!r}: {error}") from error
        self.diffusion = diffusion.to(self.device)
        # one list, so that choosing a step's timestep needs no copy from the device
        self.timestep_list = diffusion.timesteps.tolist()
        self.calls = UNetCalls()
        self.stopwatch = Stopwatch(self.device)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.image_shape: tuple[int, int, int] = (self.unet.config.in_channels, height, width)

    def model_output(self, latents: Tensor, timesteps: int | Tensor) -> Tensor:
        """The UNet's prediction in its own dtype, [B, C, H, W]; `timesteps` is one value or [B]."""
        self.calls.batches += 1
        self.calls.forwards += len(latents)
        with self.stopwatch.running():
            return (self.trained if torch.is_grad_enabled() else self.network)(latents, timesteps)

    def attach(self, forward: Callable[[Tensor, int | Tensor], Tensor]) -> None:
        """Let calls with gradient go through an engine's wrapper of the network.

        Calls without gradient go to the network itself, whose weights must be whole: inside `Engine.gathered()`.
        """
        self.trained = forward

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of the UNet's blocks and run each block again in the backward."""
        self.unet.enable_gradient_checkpointing(NOT_REENTRANT)

    def compile(self, mode: str) -> None:
        """Run the UNet compiled, see `compile_unet`; its graphs are made at its first calls, so see `warm_up` too."""
        compile_unet(self.unet, mode)
        self.network.compiled = mode != "none"

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Panels and checks are no part of what training costs: calls inside are not counted."""
        kept, self.calls = self.calls, UNetCalls()
        try:
            yield
        finally:
            self.calls = kept

    def images(self, latents: Tensor) -> Tensor:
        """Clean latents in [-1, 1] to images [B, 3, H, W] in [0, 1]; a grey channel is repeated.

        Raises:
            FloatingPointError: a latent is NaN or infinite, which the clamp would hide in part.
        """
        if not torch.isfinite(latents).all():
            raise FloatingPointError(
                "the images are not finite: the model's weights have diverged or were NaN when loaded; "
                "lower optimizer.learning_rate and resume from the last checkpoint, or check model.name"
            )
        images = (latents / 2 + 0.5).clamp(0, 1)
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images

    def save(self, folder: Path) -> None:
        """Write a diffusers folder (safetensors) that `DiffusionPipeline.from_pretrained` loads and runs."""
        from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline

        scheduler = self.scheduler
        if type(scheduler).__name__ == "PNDMScheduler":
            # no unconditional pipeline runs a PNDM; here it is sampled as a DDIM that does not clip
            scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
        pipeline: Any = DDIMPipeline if isinstance(scheduler, DDIMScheduler) else DDPMPipeline
        with _contiguous(self.unet):
            pipeline(unet=self.unet, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)


@contextmanager
def _contiguous(module: nn.Module) -> Iterator[None]:
    """Weights in the order that safetensors writes; afterwards they are where and as they were."""
    kept = [(parameter, parameter.data) for parameter in module.parameters() if not parameter.is_contiguous()]
    try:
        for parameter, data in kept:
            parameter.data = data.contiguous()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
