"""Calling: how a denoiser of each kind is called, and the shape of its latents.

Kinds of models differ in names of arguments, what stands for a step (a timestep or σ), and latents as an image or
packed into tokens. The loop and the engines see `Network` only; calls of transformers are in families/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

# inputs that SDXL's UNet takes in a mapping of their own; flat here, so that engines and rows treat all inputs alike
_ADDED = ("text_embeds", "time_ids")

Forward = Callable[[Any, Tensor, float | Tensor, Mapping[str, Tensor]], Tensor]
"""(denoiser, latents [B, …], timesteps: one value or [B], inputs of a `Condition`) -> the output [B, …]."""


def call_unet(unet: Any, latents: Tensor, timesteps: float | Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Call a UNet2DModel or UNet2DConditionModel on latents [B, C, H, W]."""
    named: dict[str, Any] = {name: tensor for name, tensor in inputs.items() if name not in _ADDED}
    if added := {name: tensor for name, tensor in inputs.items() if name in _ADDED}:
        named["added_cond_kwargs"] = added
    output: Tensor = unet(latents, timesteps, return_dict=False, **named)[0]
    return output


def timestep_rows(timesteps: float | Tensor, latents: Tensor) -> Tensor:
    """The timestep of each row [B]."""
    if isinstance(timesteps, Tensor):
        return timesteps.expand(len(latents))
    return torch.full((len(latents),), float(timesteps), device=latents.device)


@dataclass(frozen=True)
class Shape:
    """The latents of a model at a size of its images, and the call that takes them."""

    latents: tuple[int, ...]
    """[C, h, w], or [tokens, C] where they are packed."""
    call: Forward
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


@dataclass(frozen=True)
class Layout:
    """How a kind of denoiser is called, and what its latents are."""

    call: Callable[..., Tensor]
    """A `Forward`; of packed latents with `grid`, rows and columns of the tokens, besides."""
    patch: Callable[[Mapping[str, Any]], int]
    """The denoiser's config -> side in latents of what it can't divide further."""
    tokens: bool = False
    """Whether it makes tokens of the latents, by whose number schedulers shift their σ."""
    packed: bool = False
    """Whether the latents are those tokens, [tokens, C]."""
    side: Callable[[Mapping[str, Any]], Any] = itemgetter("sample_size")
    """The denoiser's config -> side of the latents at the model's own size, or (height, width)."""


UNET = Layout(call_unet, patch=lambda config: int(2 ** (len(config["block_out_channels"]) - 1)))


def shape_of(
    name: str,
    layout: Layout,
    denoiser: Mapping[str, Any],
    vae: Mapping[str, Any] | None = None,
    image_size: int | None = None,
) -> Shape:
    """The latents of a model and how it is called.

    Args:
        name: model.name, for errors.
        denoiser, vae: configs of the UNet or transformer and of the AutoencoderKL, with defaults filled in.
        image_size: model.image_size, pixels; None for the size that the model's config says.

    Raises:
        ValueError: the size does not divide into latents and patches, or is beyond the model's positions.
    """
    side = layout.side(denoiser)
    height, width = (side, side) if isinstance(side, int) else side
    if vae is None:
        return Shape((denoiser["in_channels"], height, width), layout.call, None)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    patch = layout.patch(denoiser)
    if image_size is not None:
        _check_image_size(name, image_size, factor, patch, denoiser)
        height = width = image_size // factor
    size, grid = (height * factor, width * factor), (height // patch, width // patch)
    if layout.packed:
        return Shape((grid[0] * grid[1], denoiser["in_channels"]), partial(layout.call, grid=grid), size, grid)
    return Shape((denoiser["in_channels"], height, width), layout.call, size, grid if layout.tokens else None)


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
