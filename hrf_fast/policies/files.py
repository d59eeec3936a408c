"""Files of a model: where its parts lie, what their configs say, and which files hold the weights. Nothing is loaded.

The pipeline's class in model_index.json decides which policy a model gets; a class that has none is refused by name, as
is a UNet of a kind that the trainer can't drive. Both happen before weights are downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hrf_fast.assets import ASSETS, SHIPPED
from hrf_fast.hub import files_in, find_folder
from hrf_fast.policies.sampler import COMPATIBLE

PIXEL_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
LATENT_PIPELINES = ("LDMPipeline",)
# diffusers' names: the weights of a part are one file, or shards that an index lists
WEIGHTS = "diffusion_pytorch_model"
_VARIANT = re.compile(rf"{WEIGHTS}\.(?:(?:safetensors|bin)\.index\.)?([^.-]+)\.(?:safetensors|bin|json)")
_INDEXES = f"{WEIGHTS}.*index*.json"
CONFIGS = (
    *("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "vqvae/config.json"),
    *("config.json", "scheduler_config.json"),
    *(_INDEXES, f"unet/{_INDEXES}", f"vqvae/{_INDEXES}"),
)
# settings of a UNet by which something else than the step steers it
_CONDITIONED = ("num_class_embeds", "class_embed_type", "cross_attention_dim", "encoder_hid_dim", "addition_embed_type")
_BLOCKS = ("down_block_types", "mid_block_type", "up_block_types")


@dataclass(frozen=True)
class Component:
    """A part of a pipeline: the folder that holds it, its config, and the files of its weights."""

    folder: Path
    config: dict[str, Any]
    weights: tuple[str, ...] = ()
    """Names in the folder: one file, or an index and then its shards; empty where there are none."""
    variant: str | None = None
    """The variant that these files are of."""


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's parts lie; nothing is loaded yet."""

    name: str
    unet: Component
    scheduler: Component
    vqvae: Component | None
    """The decoder of a latent model; None for a pixel model."""


def read_model(
    name: str, revision: str | None = None, variant: str | None = None, *, weights: bool = True
) -> ModelFiles:
    """Find a model's parts and read their configs; without `weights` nothing else is looked for or downloaded.

    Args:
        name, revision, variant: see `load_policy`.

    Raises:
        ValueError: no such model, no UNet in it, one of a kind that this trainer cannot drive, or no weights for it.
    """

    def choose(folder: Path, names: Collection[str]) -> list[str]:
        files = _with_weights(_read(name, folder), folder, names, variant or None)
        parts = [part for part in (files.unet, files.vqvae) if part]
        return [(part.folder / file).relative_to(folder).as_posix() for part in parts for file in part.weights]

    folder = find_folder(
        "model.name",
        name,
        shipped={known: ASSETS / known / "model" for known in SHIPPED},
        revision=revision,
        files=CONFIGS,
        choose=choose if weights else None,
    )
    files = _read(name, folder)
    return _with_weights(files, folder, files_in(folder), variant or None) if weights else files


def shards_of(index: Path) -> dict[str, str]:
    """The file of each tensor, by name, as an index of sharded weights has them.

    Raises:
        ValueError: not an index, or one that names files outside its own folder.
    """
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) and Path(v).name == v for v in shards.values()):
        raise ValueError(
            f"model.name: {index} has no weight_map from tensors to files beside it; save the model again with "
            "diffusers' save_pretrained"
        )
    return shards


def _read(name: str, folder: Path) -> ModelFiles:
    """The parts in a folder by their configs."""
    latent = _pipeline(folder, name) in LATENT_PIPELINES
    unet = _component(folder, "unet", "config.json")
    scheduler = _component(folder, "scheduler", "scheduler_config.json")
    _check_unet(name, unet.config)
    if scheduler.config.get("_class_name") not in COMPATIBLE:
        raise ValueError(
            f"model.name is {name!r}, whose scheduler is {scheduler.config.get('_class_name')}; "
            f"use one of {', '.join(COMPATIBLE)}"
        )
    vqvae = _component(folder, "vqvae", "config.json") if latent else None
    if vqvae is not None and vqvae.config.get("_class_name") != "VQModel":
        raise ValueError(
            f"model.name is {name!r}, whose vqvae is a {vqvae.config.get('_class_name')}; an LDMPipeline has a VQModel"
        )
    return ModelFiles(name, unet, scheduler, vqvae)


def _check_unet(name: str, config: dict[str, Any]) -> None:
    """Refuse a UNet that anything but the noisy image and a discrete step goes into."""
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(
            f"model.name is {name!r}, whose UNet is a {config.get('_class_name')}; this trainer drives "
            "unconditional UNet2DModel pipelines (DDPM, DDIM, LDM), e.g. google/ddpm-celebahq-256"
        )
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


def _with_weights(files: ModelFiles, folder: Path, names: Collection[str], variant: str | None) -> ModelFiles:
    """The model with the files of its weights, chosen among `names`, which are relative to the folder."""
    variants = sorted({match[1] for name in names if (match := _VARIANT.fullmatch(name.rpartition("/")[2]))})

    def choose(part: Component) -> Component:
        # as in diffusers, a part without files of the variant has its plain ones read
        for choice in (variant, None):
            if weights := _weight_files(part.folder, folder, names, choice):
                return replace(part, weights=tuple(weights), variant=choice)
        way_out = f"set model.variant to one of {', '.join(variants)}" if variants else "use a model with weights"
        raise ValueError(
            f"model.name is {files.name!r}, but {part.folder} has no {WEIGHTS}.safetensors and no .bin; {way_out}"
        )

    unet, vqvae = choose(files.unet), files.vqvae and choose(files.vqvae)
    if variant and not any(part.variant for part in (unet, vqvae) if part):
        raise ValueError(
            f"model.variant is {variant!r}, but {files.name!r} has no weights of it; "
            f"use {' or '.join([*variants, 'null'])}"
        )
    return replace(files, unet=unet, vqvae=vqvae)


def _weight_files(part: Path, folder: Path, names: Collection[str], variant: str | None) -> list[str]:
    """The files of a part that diffusers reads: safetensors before .bin, an index with its shards before a single file.

    Returns:
        Their names in the part's folder; nothing where it has none of the variant.
    """
    start = "" if part == folder else f"{part.name}/"
    dot = f".{variant}" if variant else ""
    for suffix in ("safetensors", "bin"):
        # the second form is how diffusers once named the index of a variant
        for index in (f"{WEIGHTS}.{suffix}.index{dot}.json", f"{WEIGHTS}.{suffix}{dot}.index.json"):
            if start + index in names:
                return [index, *sorted(set(shards_of(part / index).values()))]
        if start + (single := f"{WEIGHTS}{dot}.{suffix}") in names:
            return [single]
    return []


def _pipeline(folder: Path, name: str) -> str:
    """The class that model_index.json names; a folder without the file is taken for a pixel model.

    Raises:
        ValueError: a class that no policy drives.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return PIXEL_PIPELINES[0]
    kind = _read_json(index).get("_class_name", PIXEL_PIPELINES[0])
    if kind not in (*PIXEL_PIPELINES, *LATENT_PIPELINES):
        raise ValueError(
            f"model.name is {name!r}, whose model_index.json says {kind}; there is a policy for "
            f"{', '.join((*PIXEL_PIPELINES, *LATENT_PIPELINES))} only"
        )
    return str(kind)


def _component(folder: Path, name: str, config: str) -> Component:
    """A pipeline part and its config: in its own subfolder, or at the top as in older hub repositories."""
    for candidate in (folder / name, folder):
        if (candidate / config).is_file():
            return Component(candidate, _read_json(candidate / config))
    raise ValueError(
        f"model.name is {str(folder)!r}, which holds no {name}/{config} (nor {config}); "
        "give a diffusers pipeline folder with unet/ and scheduler/"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"model.name: {path} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"model.name: {path} holds a JSON {type(values).__name__}, not an object; "
            "give the file that diffusers' save_pretrained writes"
        )
    return values
