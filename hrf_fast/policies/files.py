"""Files of a model: where its parts lie, what their configs say, and which files hold the weights. Nothing is loaded.

The pipeline's class in model_index.json decides which policy a model gets; a class that has none is refused by name, as
is a model that its family can't drive exactly. Both happen before weights are downloaded.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hrf_fast.assets import ASSETS, SHIPPED
from hrf_fast.hub import files_in, find_folder
from hrf_fast.policies.component import INDEXES, VARIANT, Component, read_json, stems, weight_files
from hrf_fast.policies.families.base import Family
from hrf_fast.policies.families.table import FAMILIES
from hrf_fast.policies.lora import LORA_WEIGHTS
from hrf_fast.policies.schedulers import check_scheduler

# an encoder that model_index.json may say that a pipeline lacks, as [null, null], and its tokenizer
_OPTIONAL = ("text_encoder_3", "tokenizer_3")
TINY_DECODERS = (
    "an AutoencoderTiny such as madebyollin/taesd (SD), madebyollin/taesdxl (SDXL), madebyollin/taesd3 (SD3) or "
    "madebyollin/taef1 (FLUX), or null for the model's own VAE"
)
"""Values of model.decoder that there are, for errors."""
# files that hold a whole model of other programs
_CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# of every model; those of text-to-image parts follow where model_index.json has them
CONFIGS = (
    *("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "vqvae/config.json"),
    *("config.json", "scheduler_config.json", "transformer/config.json"),
    *(INDEXES, f"unet/{INDEXES}", f"vqvae/{INDEXES}", f"transformer/{INDEXES}"),
)


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's parts lie; nothing is loaded yet."""

    name: str
    pipeline: str
    """The pipeline's class."""
    parts: dict[str, Component]
    """unet or transformer, scheduler, and by the pipeline vqvae, or vae and pairs of text_encoder and tokenizer."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The values of model_index.json."""
    max_sequence_length: int | None = None
    """Tokens of T5 in place of the pipeline's own number."""

    @property
    def family(self) -> Family:
        return FAMILIES[self.pipeline]

    @property
    def t5_length(self) -> int:
        """Tokens of T5 for a prompt; 0 for a pipeline without T5."""
        return self.max_sequence_length or self.family.t5_length

    @property
    def denoiser(self) -> str:
        """The name of the part that is trained."""
        return "transformer" if "transformer" in self.parts else "unet"

    @property
    def takes_prompts(self) -> bool:
        return "tokenizer" in self.parts


def read_model(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    *,
    weights: bool = True,
    max_sequence_length: int | None = None,
) -> ModelFiles:
    """Find a model's parts and read their configs; without `weights` nothing else is looked for or downloaded.

    Args:
        name, revision, variant, max_sequence_length: see `ModelConfig`.

    Raises:
        ValueError: no such model, a pipeline without a policy, a part that is missing or of another class, or no
            weights for one.
    """

    def choose(folder: Path, names: Collection[str]) -> list[str]:
        configs = [file for file in names if any(fnmatch.fnmatch(file, pattern) for pattern in _configs(folder, name))]
        if not weights or not all((folder / file).is_file() for file in configs):
            return configs
        files = _with_weights(_read(name, folder), folder, names, variant or None)
        return [
            (part.folder / file).relative_to(folder).as_posix()
            for part in files.parts.values()
            for file in part.weights
        ]

    _check_no_file(name)
    folder = find_folder(
        "model.name",
        name,
        shipped={known: ASSETS / known / "model" for known in SHIPPED},
        revision=revision,
        files=CONFIGS,
        choose=choose,
    )
    files = replace(_read(name, folder), max_sequence_length=max_sequence_length)
    return _with_weights(files, folder, files_in(folder), variant or None) if weights else files


def read_decoder(name: str, *, weights: bool = True) -> Component:
    """The AutoencoderTiny of model.decoder: a folder or a hub id; without `weights` its config alone is looked for.

    Raises:
        ValueError: no such folder, another class, or no weights.
    """
    option = "model.decoder"

    def read(folder: Path, names: Collection[str]) -> Component:
        if not (folder / "config.json").is_file():
            raise ValueError(f"{option} is {name!r}, which holds no config.json; give an AutoencoderTiny of diffusers")
        part = Component(folder, read_json(folder / "config.json", option), "AutoencoderTiny")
        if part.config.get("_class_name") != part.kind:
            raise ValueError(f"{option} is {name!r}, which is a {part.config.get('_class_name')}; give {TINY_DECODERS}")
        if not weights:
            return part
        if not (chosen := weight_files(part, folder, names, None)):
            raise ValueError(f"{option} is {name!r}, which has no weights; give a folder that save_pretrained wrote")
        return replace(part, weights=tuple(chosen))

    configs = ("config.json", INDEXES)
    folder = find_folder(option, name, files=configs, choose=lambda folder, names: read(folder, names).weights)
    return read(folder, files_in(folder))


def _check_no_file(name: str) -> None:
    """Refuse a single file, which lacks the configs of the parts, with the way to a folder that has them."""
    path = Path(name).expanduser() if isinstance(name, str) else Path()
    if not path.is_file():
        return
    way_out = "name the folder of a diffusers pipeline or a hub id"
    if path.suffix.lower() == ".gguf":
        way_out = "its weights are quantised and can't be trained: name the diffusers folder or the hub id of the model"
    elif path.suffix.lower() in _CHECKPOINTS:
        way_out = (
            f"convert it once with diffusers, `StableDiffusionPipeline.from_single_file({name!r})"
            ".save_pretrained(FOLDER)` (StableDiffusionXLPipeline for an XL), and name that folder"
        )
    raise ValueError(f"model.name is {name!r}, a single file and no diffusers folder; {way_out}")


def _read(name: str, folder: Path) -> ModelFiles:
    """The parts in a folder by their configs."""
    index = folder / "model_index.json"
    settings = read_json(index) if index.is_file() else {}
    pipeline = _pipeline(folder, name)
    absent = _absent(name, settings)
    parts = {
        part: _component(name, folder, pipeline, part, kind)
        for part, kind in FAMILIES[pipeline].parts.items()
        if part not in absent
    }
    files = ModelFiles(name, pipeline, parts, settings)
    configs = {part: component.config for part, component in parts.items()}
    flow = [known for known, family in FAMILIES.items() if family.flow]
    try:
        files.family.check(name, configs)
        check_scheduler(name, configs["scheduler"], pipeline, ddpm=files.family.ddpm, flow_pipelines=flow)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"model.name is {name!r}, whose configs have a value of a wrong type ({error}); take the files that the "
            "model was saved with"
        ) from error
    return files


def _absent(name: str, settings: dict[str, Any]) -> tuple[str, ...]:
    """The parts that a pipeline does without; a tokenizer goes with its encoder, as in diffusers.

    Raises:
        ValueError: an encoder without a tokenizer.
    """
    encoder, tokenizer = _OPTIONAL
    without = [part for part in _OPTIONAL if settings.get(part) == [None, None]]
    if without == [tokenizer]:
        raise ValueError(
            f"model.name is {name!r}, whose model_index.json has a {encoder} but no {tokenizer} for it; save the model "
            f"with both, or with {encoder}=None"
        )
    return _OPTIONAL if without else ()


def _configs(folder: Path, name: str) -> list[str]:
    """Patterns of the small files that a text-to-image pipeline has besides `CONFIGS`."""
    parts = FAMILIES[_pipeline(folder, name)].parts
    if "tokenizer" not in parts:
        return []
    tokenizers = [f"{part}/{file}" for part in parts if "tokenizer" in part for file in ("*.json", "*.txt")]
    networks = [part for part in parts if part == "vae" or "text_encoder" in part]
    return [*tokenizers, *(f"{part}/{file}" for part in networks for file in ("config.json", "*.index*.json"))]


def _pipeline(folder: Path, name: str) -> str:
    """The class that model_index.json names; a folder without the file is taken for a pixel model.

    Raises:
        ValueError: a class that no policy drives.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return "DDPMPipeline"
    kind = read_json(index).get("_class_name", "DDPMPipeline")
    if not isinstance(kind, str):
        raise ValueError(
            f"model.name is {name!r}, whose model_index.json says {kind}, a pipeline with code of its own; use a model "
            f"of one of {', '.join(FAMILIES)}"
        )
    if kind not in FAMILIES:
        base = kind.replace("Img2Img", "").replace("Inpaint", "")
        way_out = (
            f"; if its UNet takes 4 channels (in_channels of unet/config.json), write {base} into model_index.json"
            if base in FAMILIES and "unet" in FAMILIES[base].parts
            else ""
        )
        raise ValueError(
            f"model.name is {name!r}, whose model_index.json says {kind}; there is a policy for "
            f"{', '.join(FAMILIES)} only{way_out}"
        )
    return kind


def _component(name: str, folder: Path, pipeline: str, part: str, kind: str) -> Component:
    """A pipeline part and its config: in its own subfolder, or at the top as in older hub repositories.

    Args:
        kind: the class that it must be; "" for a scheduler, whose class is in its config.
    """
    kinds = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
    config = kinds.get(part.rstrip("_23"), "config.json")
    for candidate in (folder / part, folder):
        if (candidate / config).is_file():
            values = read_json(candidate / config)
            says = values.get("_class_name") or (values.get("architectures") or [None])[0]
            if "Tokenizer" in kind:
                says = values.get("tokenizer_class", kind)
            # a tokenizer's class has two names
            if kind and str(says).removesuffix("Fast") != kind.removesuffix("Fast"):
                raise ValueError(
                    f"model.name is {name!r}, whose {part} is a {says} where a {pipeline} has a {kind}; use a folder "
                    "as diffusers' save_pretrained writes it"
                )
            return Component(candidate, values, kind or str(says))
    if (folder / LORA_WEIGHTS).is_file():
        raise ValueError(
            f"model.name is {str(folder)!r}, which holds adapters and no model; `hrf sample` draws with those of a "
            "RUN or a RUN/blend, and `hrf export RUN --merge` makes a whole model of them"
        )
    raise ValueError(
        f"model.name is {str(folder)!r}, which holds no {part}/{config} (nor {config}); "
        f"give a diffusers pipeline folder with {part}/ and its other parts"
    )


def _with_weights(files: ModelFiles, folder: Path, names: Collection[str], variant: str | None) -> ModelFiles:
    """The model with the files of its weights, chosen among `names`, which are relative to the folder."""
    networks = {name: part for name, part in files.parts.items() if part.has_weights}
    folders = {"" if part.folder == folder else part.folder.name for part in networks.values()}
    split = [name.rpartition("/") for name in names]
    variants = sorted({match[1] for at, _, file in split if at in folders and (match := VARIANT.fullmatch(file))})

    def choose(part: Component) -> Component:
        # as in diffusers, a part without files of the variant has its plain ones read
        for choice in (variant, None):
            if weights := weight_files(part, folder, names, choice):
                return replace(part, weights=tuple(weights), variant=choice)
        way_out = f"set model.variant to one of {', '.join(variants)}" if variants else "use a model with weights"
        stem = stems(part)["safetensors"]
        raise ValueError(
            f"model.name is {files.name!r}, but {part.folder} has no {stem}.safetensors and no .bin; {way_out}"
        )

    chosen = {name: choose(part) for name, part in networks.items()}
    if variant and not any(part.variant for part in chosen.values()):
        raise ValueError(
            f"model.variant is {variant!r}, but {files.name!r} has no weights of it; "
            f"use {' or '.join([*variants, 'null'])}"
        )
    return replace(files, parts=files.parts | chosen)
