"""Checks of options by the model: one that would do nothing for it, or that it can't follow, is refused by name."""

from __future__ import annotations

from hrf_fast.config.load import differences
from hrf_fast.config.options import FACTS, Config, ModelConfig, SampleConfig
from hrf_fast.config.run_options import ComputeConfig
from hrf_fast.policies.files import TINY_DECODERS, ModelFiles, read_decoder

FOR_PROMPTS = (
    *("sample.guidance_scale", "model.decoder", "model.image_size"),
    *("compute.offload", "compute.encoder_precision"),
)
"""Options that text-to-image models alone follow."""
FOR_UNETS = ("compute.attention", "compute.channels_last")
"""Options that a transformer does not follow."""


def check_options(files: ModelFiles, model: ModelConfig, sample: SampleConfig, compute: ComputeConfig) -> None:
    """Refuse guidance below 1, options of other kinds of models, and a model.decoder of other channels or scale."""
    FACTS["sample.guidance_scale"].check("sample.guidance_scale", sample.guidance_scale)
    asked = differences(Config(), Config(model=model, sample=sample, compute=compute))
    for option, (neutral, value) in asked.items():
        if option in FOR_PROMPTS and not files.takes_prompts:
            raise ValueError(
                f"{option} is {value} but model.name is {files.name!r}, an unconditional model, which has no prompts "
                f"to steer it and no encoders; leave it at {neutral}, or name a text-to-image model"
            )
        if option in FOR_UNETS and files.denoiser == "transformer":
            raise ValueError(
                f"{option} is {value} but model.name is {files.name!r}, a transformer, for which it does nothing; "
                f"leave it at {neutral}"
            )
    if files.max_sequence_length is not None and not files.family.t5_length:
        raise ValueError(
            f"model.max_sequence_length is {files.max_sequence_length} but model.name is {files.name!r}, which has no "
            "T5; leave it out"
        )
    files.family.check_guidance(files.name, files.parts[files.denoiser].config, sample.guidance_scale)
    if model.decoder:
        _check_decoder(files, model.decoder)


def _check_decoder(files: ModelFiles, name: str) -> None:
    """Refuse a tiny decoder whose latents are not the VAE's; without a key, a config has its class's default."""
    tiny, vae = read_decoder(name, weights=False).config, files.parts["vae"].config
    halvings = len(tiny.get("decoder_block_out_channels", [64] * 4)) - 1, len(vae.get("block_out_channels", [64])) - 1
    rules = {
        "channels": (tiny.get("latent_channels", 4), vae.get("latent_channels", 4)),
        "pixels a side": (tiny.get("upsampling_scaling_factor", 2) ** halvings[0], 2 ** halvings[1]),
    }
    for unit, (of_tiny, of_vae) in rules.items():
        if of_tiny != of_vae:
            raise ValueError(
                f"model.decoder is {name!r}, which makes images of latents of {of_tiny} {unit}, but those of "
                f"model.name {files.name!r} have {of_vae}; use {TINY_DECODERS}"
            )
