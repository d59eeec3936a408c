"""An MLP as a policy behind the trainer's protocol, its pretraining, and features of points for novelty and Vendi.

The latents are points [B, 2] and their images have one pixel, so the loop, the kernels and the panel run as they do on
pictures.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.toys.mixtures import Toy, images_of, points_of
from hrf_fast.policies.denoiser import check_finite
from hrf_fast.policies.sampler import build_sampler
from hrf_fast.policies.unconditional import UnconditionalPolicy

_WIDTH, _FREQUENCIES = 64, 8


class Mlp(nn.Module):
    """Four layers that predict the noise of points [B, 2] at a timestep, called as diffusers' UNets are."""

    config = {"in_channels": 2, "sample_size": 1}

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(2 + 2 * _FREQUENCIES, _WIDTH), nn.SiLU()),
            *(nn.Linear(_WIDTH, _WIDTH), nn.SiLU()),
            *(nn.Linear(_WIDTH, _WIDTH), nn.SiLU()),
            nn.Linear(_WIDTH, 2),
        )

    def forward(self, points: Tensor, timesteps: int | Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The predicted noise [B, 2]; timesteps from 0 to 999, one or [B]."""
        time = torch.as_tensor(timesteps, dtype=torch.float32).expand(len(points)) / 1000
        angles = time[:, None] * torch.arange(1, _FREQUENCIES + 1) * torch.pi
        return (self.layers(torch.cat([points, angles.sin(), angles.cos()], 1)),)


class PointPolicy(UnconditionalPolicy):
    """The policy of an MLP over points."""

    def __init__(self, mlp: Mlp, *, num_inference_steps: int) -> None:
        scheduler = noise_schedule()
        sampler = build_sampler(scheduler, kind="ddim", num_inference_steps=num_inference_steps, eta=1.0)
        super().__init__(mlp, scheduler, sampler)
        self.latent_shape = (2,)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, 1, 1] of points."""
        check_finite(latents)
        return images_of(latents)

    def blocks(self) -> list[nn.Module]:
        return []

    def compile(self, mode: str) -> None:
        if mode != "none":
            raise ValueError(f"compute.compile is {mode}, but an MLP over points runs as it is; use none")

    def save(self, folder: Path) -> None:
        """Write the weights and how many steps sample them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.unet.state_dict(), folder / "mlp.safetensors")
        (folder / "mlp.json").write_text(json.dumps({"num_inference_steps": len(self.sampler)}) + "\n")

    def example(
        self, scheduler: str, num_inference_steps: int, eta: float, base: str = '"."', negative: str = ""
    ) -> str:
        return "mlp = Mlp()\nmlp.load_state_dict(load_file('mlp.safetensors'))\n"


class PointFeatures:
    """Random Fourier features of points, whose cosine is about a Gaussian kernel of the distance."""

    name = "points"

    def __init__(self, width: float = 0.3, count: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        self._frequencies = torch.randn(2, count, generator=generator) / width

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, 1, 1] -> [B, 2·count]."""
        angles = points_of(images).float() @ self._frequencies
        return torch.cat([angles.cos(), angles.sin()], 1)


def noise_schedule() -> Any:
    """DDPM's, which the MLP learns and the sampler is made of."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(clip_sample=False)


def pretrain(toy: Toy, *, steps: int = 2000, seed: int = 0) -> Mlp:
    """Train an MLP to predict the noise of the toy's points: Adam, batches of 256, a cosine to 0.

    The target is the expected noise, which a mixture has in closed form: the minimiser is that of drawn noise, and
    seconds are enough.
    """
    torch.manual_seed(seed)
    mlp, generator = Mlp(), torch.Generator().manual_seed(seed)
    alphas = noise_schedule().alphas_cumprod
    optimizer = torch.optim.Adam(mlp.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        points, timesteps = toy.draw(256, generator), torch.randint(1000, (256,), generator=generator)
        alpha = alphas[timesteps, None]
        noised = alpha.sqrt() * points + (1 - alpha).sqrt() * torch.randn(points.shape, generator=generator)
        (predicted,) = mlp(noised, timesteps)
        optimizer.zero_grad()
        (predicted - toy.expected_noise(noised, alpha)).square().mean().backward()
        optimizer.step()
        schedule.step()
    return mlp


def policy_of(mlp: Mlp, *, num_inference_steps: int) -> PointPolicy:
    """A policy of a copy of the weights, so that runs don't share them."""
    return PointPolicy(copy.deepcopy(mlp), num_inference_steps=num_inference_steps)
