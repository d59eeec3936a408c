"""Checks: what configs say of a model that the trainer can't drive exactly; each refusal names the setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hrf_fast.policies.base import Policy

# settings of a UNet2DModel by which something else than the step steers it
_CONDITIONED = ("num_class_embeds", "class_embed_type", "cross_attention_dim", "encoder_hid_dim", "addition_embed_type")
_BLOCKS = ("down_block_types", "mid_block_type", "up_block_types")
# settings of a UNet2DConditionModel by which something else than step and prompt steers it
_MORE_CONDITIONS = ("num_class_embeds", "class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type")


def check_options(
    name: str, takes_prompts: bool, *, guidance_scale: float, decoder: str | None = None, offload: bool = False
) -> None:
    """Refuse options of text-to-image models that would do nothing for another.

    Args:
        name: model.name; the options are sample.guidance_scale, model.decoder and compute.offload.
    """
    values = {"sample.guidance_scale": (guidance_scale, 1), "model.decoder": (decoder, None)}
    for option, (value, neutral) in {**values, "compute.offload": (offload, False)}.items():
        if value != neutral and not takes_prompts:
            raise ValueError(
                f"{option} is {value} but model.name is {name!r}, an unconditional model, which has no prompts to "
                f"steer it and no encoders; leave it at {neutral}, or name a text-to-image model"
            )


def check_given(
    policy: Policy, *, num_inference_steps: int, guidance_scale: float, precision: str, lora_rank: int
) -> Policy:
    """Check a policy that is given as an object against the options of those names; returns it.

    Raises:
        ValueError: another number of steps, guidance or precision than the policy has, or adapters, which are added to
            models that are loaded by name only.
    """
    values = {
        "sample.num_inference_steps": (num_inference_steps, len(policy.sampler)),
        "sample.guidance_scale": (guidance_scale, policy.guidance_scale),
        "compute.precision": (precision, policy.precision),
        "lora.rank": (lora_rank, 0),
    }
    for option, (value, of_policy) in values.items():
        if value != of_policy:
            raise ValueError(f"{option} is {value} but the policy that was given has {of_policy}; make the two equal")
    return policy


def check_unconditional(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a UNet2DModel that anything but the noisy image and a discrete step goes into.

    Args:
        name: model.name, for errors; config: of the UNet, as its file has it.
    """
    conditions = {key: config[key] for key in _CONDITIONED if config.get(key) is not None}
    blocks = {key: config[key] for key in _BLOCKS if "CrossAttn" in str(config.get(key))}
    for key, value in (conditions | blocks).items():
        raise ValueError(
            f"model.name is {name!r}, whose UNet is conditioned on a class or a text ({key}: {value!r}), which is "
            "not supported; use an unconditional model"
        )
    time = config.get("time_embedding_type", "positional")
    if time not in ("positional", "learned"):
        raise ValueError(
            f"model.name is {name!r}, whose UNet takes noise levels instead of steps (time_embedding_type: {time!r}) "
            "as score-based VE models do; use a model of DDPM's kind, whose time_embedding_type is positional"
        )


def check_text_to_image(name: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a Stable Diffusion whose UNet wants other inputs than latents, a step and the encoders' embeddings.

    Args:
        configs: of unet, vae, text_encoder and, for SDXL, text_encoder_2, as their files have them.
    """
    unet, start = configs["unet"], f"model.name is {name!r}, whose UNet "
    encoders = [config for part, config in configs.items() if part.startswith("text_encoder")]
    channels = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if channels[0] != channels[1]:
        raise ValueError(
            f"{start}takes {channels[0]} channels and returns {channels[1]}: one for inpainting or editing, whose "
            "pictures to begin with nobody draws here; use a text-to-image model"
        )
    if unet.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"{start}takes the guidance scale as an input (time_cond_proj_dim: {unet['time_cond_proj_dim']}) as latent "
            "consistency models do, and has no unconditional branch; use the model that it was distilled from"
        )
    conditions = {key: unet[key] for key in _MORE_CONDITIONS if unet.get(key) is not None}
    xl = len(encoders) > 1
    if unet.get("addition_embed_type") != ("text_time" if xl else None):
        conditions["addition_embed_type"] = unet.get("addition_embed_type")
    if unet.get("attention_type", "default") != "default":
        conditions["attention_type"] = unet["attention_type"]
    for key, value in conditions.items():
        raise ValueError(
            f"{start}is not steered as Stable Diffusion's are ({key}: {value!r}); use a model of Stable Diffusion 1, 2 "
            "or XL"
        )
    if (time := unet.get("time_embedding_type", "positional")) != "positional":
        raise ValueError(
            f"{start}takes noise levels instead of steps (time_embedding_type: {time!r}); use another model"
        )
    latent = configs["vae"].get("latent_channels", 4)
    if latent != channels[0]:
        raise ValueError(f"{start}has {channels[0]} channels but whose VAE {latent}; give the parts of one model")
    _check_widths(start, unet, encoders)
    _check_size(name, unet.get("sample_size"), len(unet.get("block_out_channels", (0,) * 4)) - 1)


def _check_widths(start: str, unet: Mapping[str, Any], encoders: list[Mapping[str, Any]]) -> None:
    """Refuse text encoders whose embeddings are not as wide as the UNet takes them."""
    width, needed = sum(config.get("hidden_size", 512) for config in encoders), unet.get("cross_attention_dim", 1280)
    if any(each != width for each in (needed if isinstance(needed, list | tuple) else [needed])):
        raise ValueError(
            f"{start}takes embeddings of {needed} numbers (cross_attention_dim) but whose text encoders make {width}; "
            "give the parts of one model"
        )
    if len(encoders) > 1:
        # six time ids and the pooled embedding of the last encoder
        added = 6 * (unet.get("addition_time_embed_dim") or 0) + encoders[-1].get("projection_dim", 512)
        if unet.get("projection_class_embeddings_input_dim") != added:
            raise ValueError(
                f"{start}has projection_class_embeddings_input_dim "
                f"{unet.get('projection_class_embeddings_input_dim')}, but six time ids and the pooled embedding are "
                f"{added} numbers; use a base model of SDXL (no refiner)"
            )


def check_unet(name: str, config: Any, scheduler: Any, *, latent: bool) -> None:
    """Refuse a UNet2DModel whose input, output or table of steps is not what the sampler needs.

    Args:
        config, scheduler: their configs with defaults filled in; latent: whether a decoder follows.
    """
    if config.time_embedding_type == "learned" and config.num_train_timesteps < scheduler.num_train_timesteps:
        raise ValueError(
            f"model.name is {name!r}, whose UNet has learned {config.num_train_timesteps} steps but whose scheduler "
            f"has {scheduler.num_train_timesteps}; use the scheduler that the model was trained with"
        )
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"model.name is {name!r}, whose UNet returns {config.out_channels} channels for {config.in_channels}: a "
            "learned variance, which is not supported; use a model of fixed variance"
        )
    if config.sample_size is None or (config.in_channels not in (1, 3) and not latent):
        raise ValueError(
            f"model.name is {name!r}, whose UNet takes {config.in_channels} channels of size {config.sample_size}; a "
            "pixel-space model of 1 or 3 channels with a sample_size is needed, or an LDMPipeline with its vqvae"
        )
    _check_size(name, config.sample_size, len(config.block_out_channels) - 1)


def _check_size(name: str, size: Any, levels: int) -> None:
    """Refuse a UNet without a size of its latents, or one that it can't halve as often as it has levels."""
    sides = [size] if isinstance(size, int) else size
    if not sides:
        raise ValueError(
            f"model.name is {name!r}, whose UNet has no sample_size: that of its latents; add it to unet/config.json"
        )
    if any(side % 2**levels for side in sides):
        raise ValueError(
            f"model.name is {name!r}, whose sample_size is {size}: its UNet halves the image {levels} times, so use a "
            f"size divisible by {2**levels}"
        )
