"""Load: a policy from a shipped name, a diffusers folder or a hub id."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hrf_fast.config.options import ModelConfig, SampleConfig
from hrf_fast.config.run_options import ComputeConfig
from hrf_fast.policies.attention import set_attention
from hrf_fast.policies.base import Policy
from hrf_fast.policies.calling import Shape, shape_of
from hrf_fast.policies.encoders import PromptEncoder
from hrf_fast.policies.files import ModelFiles, read_decoder, read_model
from hrf_fast.policies.flow_sampler import choose_sampler, is_flow
from hrf_fast.policies.network import DTYPES
from hrf_fast.policies.option_checks import check_options
from hrf_fast.policies.parts import from_pretrained, load_module, quiet
from hrf_fast.policies.sampler import Sampler
from hrf_fast.policies.schedulers import make_scheduler
from hrf_fast.policies.text_to_image import TextToImagePolicy


def load_policy(
    model: ModelConfig,
    sample: SampleConfig | None = None,
    compute: ComputeConfig | None = None,
    *,
    noisy: bool = True,
    device: str | torch.device = "cpu",
    prepare: Callable[[Any], None] | None = None,
) -> Policy:
    """Load a diffusers model as a policy: an unconditional one (DDPM, DDIM, LDM), a Stable Diffusion or a FLUX.

    Args:
        model, sample, compute: sections of a configuration; None for their defaults.
        noisy: false for a policy that is to draw without noise alone, which needs no sample.scheduler of its kind.
        prepare: makes of the denoiser on the CPU what is trained, before it goes to the device: frozen weights of half
            the size never are there in full.

    The environment variable HRF_KERNELS chooses what computes log-probs and group norms, as `choose_backend` does:
    triton (fused), eager (plain torch), or auto.

    Raises:
        ValueError: no such model, no denoiser in it, one that this trainer cannot drive, or weights that are not those
            of its config or not finite; an option that this model has no use for; or an HRF_KERNELS that can't run
            here.
        ImportError: diffusers can't import the pipeline that the tuned model is saved as.
    """
    sample, compute = sample or SampleConfig(), compute or ComputeConfig()
    files = read_model(model.name, model.revision, model.variant, max_sequence_length=model.max_sequence_length)
    device = torch.device(device)
    check_options(files, model, sample, compute)
    if compute.offload and device.type == "cpu":
        raise ValueError("compute.offload is true but the model runs on the CPU, where all of it stays; leave it out")
    with quiet():
        of_model = _scheduler(files, sample.shift)
        # refused before weights are read, and not when a run has ended
        files.family.policy.saved_as(files.pipeline, of_model)
        if not noisy:
            sample = replace(sample, scheduler="cps" if is_flow(of_model) else "ddim")
        unet = load_module(_model(files), files.parts[files.denoiser])
        if prepare is not None:
            prepare(unet)
        unet = unet.to(device)
        set_attention(unet, compute.attention)
        kernels = os.environ.get("HRF_KERNELS") or "auto"
        parts = _other_parts(files)
        vae = parts["vae"].config if "vae" in parts else None
        shape = shape_of(files.name, files.family.layout, unet.config, vae, model.image_size)
        linear = files.family.linear_sigmas
        steps = choose_sampler(of_model, sample, image_tokens=shape.tokens, linear_sigmas=linear)
        options: dict[str, Any] = {
            "precision": compute.precision,
            "kernels": kernels,
            "channels_last": compute.channels_last,
            "shape": shape,
            "linear_sigmas": linear,
        }
        if files.takes_prompts:
            options |= {"guidance_scale": sample.guidance_scale, "offload": compute.offload}
            options["sized"] = model.image_size is not None
            for name, part in parts.items():
                if part is not None and name.startswith("text_encoder"):
                    part.to(DTYPES[compute.encoder_precision])
            return _text_to_image(files, unet, of_model, steps, parts, model.decoder, device, **options)
        policy: Policy = files.family.policy(
            unet, of_model, steps, *(part.to(device) for part in parts.values()), **options
        )
        return policy


def _model(files: ModelFiles) -> str:
    return f"model.name is {files.name!r}"


def _scheduler(files: ModelFiles, shift: float | None) -> Any:
    return make_scheduler(_model(files), files.parts["scheduler"].config, files.family.scheduler, shift)


def _other_parts(files: ModelFiles) -> dict[str, Any]:
    """The parts of a pipeline besides the denoiser and the scheduler; None for one that it does without."""
    parts: dict[str, Any] = dict.fromkeys(files.family.parts)
    for name, part in files.parts.items():
        load = load_module if part.has_weights else from_pretrained
        parts[name] = None if name in (files.denoiser, "scheduler") else load(_model(files), part)
    return {name: part for name, part in parts.items() if name not in (files.denoiser, "scheduler")}


def _text_to_image(
    files: ModelFiles,
    unet: Any,
    scheduler: Any,
    sampler: Sampler,
    parts: dict[str, Any],
    decoder: str | None,
    device: torch.device,
    *,
    shape: Shape,
    offload: bool,
    **options: Any,
) -> TextToImagePolicy:
    """The policy of a text-to-image model, with all parts that its pipeline has."""
    encoder = _encoder(files, parts, unet.config, shape, device, offload=offload)
    # on the CPU the VAE is kept for saving, where another decoder stands in for it
    tiny = load_module(f"model.decoder is {decoder!r}", read_decoder(decoder)) if decoder else None
    policy: TextToImagePolicy = files.family.policy(
        unet,
        scheduler,
        sampler,
        encoder,
        tiny or parts["vae"],
        pipeline=files.pipeline,
        parts=parts | files.family.settings(files.settings),
        denoiser=files.denoiser,
        # where a folder lies is no one else's business
        decoder_name=Path(decoder).name if decoder and os.path.isdir(decoder) else decoder,
        shape=shape,
        offload=offload,
        **options,
    )
    return policy


def _encoder(
    files: ModelFiles, parts: dict[str, Any], config: Any, shape: Shape, device: torch.device, *, offload: bool
) -> PromptEncoder:
    """The prompt encoder of a pipeline's tokenizers and text encoders.

    Args:
        config: of the denoiser.
    """
    tokenizers = [part for name, part in parts.items() if name.startswith("tokenizer") and part is not None]
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder") and part is not None]
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        # T5 takes any number
        most = getattr(encoder.config, "max_position_embeddings", tokenizer.model_max_length)
        if tokenizer.model_max_length > most:
            raise ValueError(
                f"{_model(files)}, whose tokenizer makes {tokenizer.model_max_length} tokens (model_max_length) but "
                f"whose text encoder takes {most}; correct tokenizer_config.json"
            )
    assert files.family.encoder is not None and shape.size is not None
    facts = {"denoiser": config, "size": shape.size, "index": files.settings}
    return files.family.encoder(tokenizers, encoders, device, **facts, t5_length=files.t5_length, offload=offload)
