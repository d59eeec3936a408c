"""Checks of options by the model: one that would do nothing for it, or that it can't follow, is refused by name."""

from __future__ import annotations

from typing import Any

from hrf_fast.config.options import FACTS
from hrf_fast.policies.files import ModelFiles


def check_options(
    files: ModelFiles,
    *,
    guidance_scale: float,
    decoder: str | None = None,
    image_size: int | None = None,
    attention: str = "sdpa",
    channels_last: bool = False,
    offload: bool = False,
    encoder_precision: str = "fp32",
) -> None:
    """Refuse guidance below 1, options of text-to-image models for another, and those of UNets for a transformer.

    Args:
        guidance_scale: sample.guidance_scale; decoder, image_size: of section model; the others: of section compute.
    """
    FACTS["sample.guidance_scale"].check("sample.guidance_scale", guidance_scale)
    for_prompts: dict[str, tuple[Any, Any]] = {
        "sample.guidance_scale": (guidance_scale, 1),
        "model.decoder": (decoder, None),
        "model.image_size": (image_size, None),
        "compute.offload": (offload, False),
        "compute.encoder_precision": (encoder_precision, "fp32"),
    }
    for option, (value, neutral) in for_prompts.items():
        if value != neutral and not files.takes_prompts:
            raise ValueError(
                f"{option} is {value} but model.name is {files.name!r}, an unconditional model, which has no prompts "
                f"to steer it and no encoders; leave it at {neutral}, or name a text-to-image model"
            )
    if files.max_sequence_length is not None and not files.family.t5_length:
        raise ValueError(
            f"model.max_sequence_length is {files.max_sequence_length} but model.name is {files.name!r}, which has no "
            "T5; leave it out"
        )
    for_unets: dict[str, tuple[Any, Any]] = {
        "compute.attention": (attention, "sdpa"),
        "compute.channels_last": (channels_last, False),
    }
    for option, (value, neutral) in for_unets.items():
        if value != neutral and files.denoiser == "transformer":
            raise ValueError(
                f"{option} is {value} but model.name is {files.name!r}, a transformer, for which it does nothing; "
                f"leave it at {neutral}"
            )
    files.family.check_guidance(files.name, files.parts[files.denoiser].config, guidance_scale)
