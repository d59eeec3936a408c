"""Calling: how a denoiser of each kind is called, and the shape of its latents.

A family of models differs in this and in its encoders alone: names of arguments, what stands for a step (a timestep or
σ), latents as an image or packed into tokens. The loop and the engines see `Network` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

FLUX, STABLE_DIFFUSION_3 = "FluxPipeline", "StableDiffusion3Pipeline"
# inputs that SDXL's UNet takes in a mapping of their own; flat here, so that engines and rows treat all inputs alike
_ADDED = ("text_embeds", "time_ids")
# side of FLUX's latents where nobody says another, as in its pipeline
_FLUX_SIDE = 128

Call = Callable[[Any, Tensor, float | Tensor, Mapping[str, Tensor]], Tensor]
"""(denoiser, latents [B, …], timesteps: one value or [B], inputs of a `Condition`) -> the output [B, …]."""


def call_unet(unet: Any, latents: Tensor, timesteps: float | Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Call a UNet2DModel or UNet2DConditionModel on latents [B, C, H, W]."""
    named: dict[str, Any] = {name: tensor for name, tensor in inputs.items() if name not in _ADDED}
    if added := {name: tensor for name, tensor in inputs.items() if name in _ADDED}:
        named["added_cond_kwargs"] = added
    output: Tensor = unet(latents, timesteps, return_dict=False, **named)[0]
    return output


def call_sd3(transformer: Any, latents: Tensor, timesteps: float | Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Call an SD3Transformer2DModel on latents [B, C, H, W] at timesteps 1000·σ."""
    output: Tensor = transformer(
        hidden_states=latents, timestep=_rows(timesteps, latents), return_dict=False, **inputs
    )[0]
    return output


def call_flux(
    transformer: Any,
    latents: Tensor,
    timesteps: float | Tensor,
    inputs: Mapping[str, Tensor],
    *,
    grid: tuple[int, int],
) -> Tensor:
    """Call a FluxTransformer2DModel, which takes σ and positions, on packed latents [B, tokens, C].

    Args:
        grid: rows and columns of the tokens.
    """
    rows, columns = (torch.arange(count, dtype=torch.float32, device=latents.device) for count in grid)
    places = torch.cartesian_prod(rows, columns)
    output: Tensor = transformer(
        hidden_states=latents,
        timestep=_rows(timesteps, latents) / 1000,
        img_ids=torch.cat([torch.zeros_like(places[:, :1]), places], dim=1),
        txt_ids=torch.zeros(inputs["encoder_hidden_states"].shape[1], 3, device=latents.device),
        return_dict=False,
        **inputs,
    )[0]
    return output


def _rows(timesteps: float | Tensor, latents: Tensor) -> Tensor:
    """The timestep of each row [B]."""
    if isinstance(timesteps, Tensor):
        return timesteps.expand(len(latents))
    return torch.full((len(latents),), float(timesteps), device=latents.device)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The latents [B, C, h, w] of FLUX's tokens [B, h/2·w/2, 4·C]."""
    rows, columns = grid
    patches = tokens.view(len(tokens), rows, columns, tokens.shape[-1] // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, 2 * rows, 2 * columns)


@dataclass(frozen=True)
class Shape:
    """The latents of a model at a size of its images, and the call that takes them."""

    latents: tuple[int, ...]
    """[C, h, w], or [tokens, C] where they are packed."""
    call: Call
    size: tuple[int, int] | None
    """Height and width of the images in pixels; None for an unconditional model."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the tokens that a transformer makes of the latents."""

    @property
    def image(self) -> tuple[int, ...]:
        """[3, H, W] of a decoded image; [C, H, W] of an unconditional model, whose latents are images."""
        return (3, *self.size) if self.size else self.latents

    @property
    def tokens(self) -> int | None:
        """Image tokens of a transformer, by which schedulers shift their σ; None for a UNet."""
        return self.grid and self.grid[0] * self.grid[1]


def shape_of(
    name: str,
    pipeline: str,
    denoiser: Mapping[str, Any],
    vae: Mapping[str, Any] | None = None,
    image_size: int | None = None,
) -> Shape:
    """The latents of a model and how it is called.

    Args:
        name: model.name, for errors; pipeline: its class.
        denoiser, vae: configs of the UNet or transformer and of the AutoencoderKL, with defaults filled in.
        image_size: model.image_size, pixels; None for the size that the model's config says.

    Raises:
        ValueError: the size does not divide into latents and patches, or is beyond the model's positions.
    """
    side = _FLUX_SIDE if pipeline == FLUX else denoiser["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    if vae is None:
        return Shape((denoiser["in_channels"], height, width), call_unet, None)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    patch = _patch(pipeline, denoiser)
    if image_size is not None:
        _check_image_size(name, image_size, factor, patch, denoiser)
        height = width = image_size // factor
    size, grid = (height * factor, width * factor), (height // patch, width // patch)
    if pipeline == FLUX:
        return Shape((grid[0] * grid[1], denoiser["in_channels"]), partial(call_flux, grid=grid), size, grid)
    if pipeline == STABLE_DIFFUSION_3:
        return Shape((denoiser["in_channels"], height, width), call_sd3, size, grid)
    return Shape((denoiser["in_channels"], height, width), call_unet, size)


def _patch(pipeline: str, denoiser: Mapping[str, Any]) -> int:
    """Side in latents of what a denoiser can't divide further."""
    if pipeline == FLUX:
        return 2
    if pipeline == STABLE_DIFFUSION_3:
        return int(denoiser["patch_size"])
    return int(2 ** (len(denoiser["block_out_channels"]) - 1))


def _check_image_size(name: str, size: int, factor: int, patch: int, denoiser: Mapping[str, Any]) -> None:
    unit, most = factor * patch, denoiser.get("pos_embed_max_size")
    if size % unit:
        raise ValueError(
            f"model.image_size is {size} but {name!r} makes images of a multiple of {unit} pixels (its VAE makes "
            f"{factor} of a latent, its denoiser takes patches of {patch}); use {max(1, round(size / unit)) * unit}"
        )
    if most is not None and size > most * unit:
        raise ValueError(
            f"model.image_size is {size} but {name!r} has positions for {most * unit} pixels at most "
            "(pos_embed_max_size); use at most that"
        )
