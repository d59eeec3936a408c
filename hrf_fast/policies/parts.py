"""Parts: a pipeline's networks with their weights. Weights that don't fit are refused by name."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hrf_fast.hub import first_line
from hrf_fast.policies.component import Component, shards_of
from hrf_fast.weights import in_words, not_finite

# the floor of setup.py
DIFFUSERS = "diffusers>=0.36"


@contextmanager
def quiet() -> Iterator[None]:
    """A block in which diffusers and transformers keep their advice and their progress bars to themselves."""
    import transformers
    from diffusers.utils import logging

    libraries = (logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        # diffusers suggests installing accelerate and safetensors variants; neither concerns the user of this call
        library.set_verbosity_error()
        # of shards, among the JSON lines of a run
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bar in zip(libraries, before, bars, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def import_pipeline(kind: str) -> Any:
    """The class of a pipeline in diffusers, which imports more of transformers than networks do.

    Raises:
        ImportError: this diffusers can't import the class; names its version and the one to install.
    """
    import diffusers

    try:
        return getattr(diffusers, kind)
    # diffusers wraps whatever has failed inside
    except Exception as error:
        reason = error
        while isinstance(reason.__cause__, Exception):
            reason = reason.__cause__
        raise ImportError(
            f"diffusers {diffusers.__version__} can't import its {kind}, which saves the tuned model "
            f'({first_line(reason)}); install one that works with this transformers: pip install "{DIFFUSERS}"'
        ) from error


def load_module(model: str, part: Component) -> Any:
    """A network with all of its weights, in fp32 and evaluation mode, on the CPU.

    Args:
        model: the option that names the model, and its value, for errors.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or not finite: diffusers leaves the memory of
            missing ones as it is.
    """
    # transformers keeps the dtype of a file
    options = {"dtype": torch.float32} if part.of_transformers else {"low_cpu_mem_usage": False}
    module, report = from_pretrained(
        model,
        part,
        variant=part.variant,
        # a .bin file is read by both libraries with torch.load(weights_only=True): tensors only, no code
        use_safetensors=any(file.endswith(".safetensors") for file in part.weights),
        # to be told all of them at once
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    problem = (
        in_words(report["missing_keys"], _unexpected(report["unexpected_keys"]), report["mismatched_keys"])
        or _shard_problem(part)
        or not_finite(module.state_dict())
    )
    if problem:
        raise ValueError(
            f"{model}, whose weights in {part.folder} can't be used: {problem}; give the config.json "
            "and the weights of one model, as diffusers' save_pretrained writes them"
        )
    # dropout would make the policy that samples another one than the policy that is trained
    return _aligned(module.float()).eval()


def from_pretrained(model: str, part: Component, **options: Any) -> Any:
    """Load a part from its folder by its own library.

    Raises:
        ValueError: config or weights do not load.
    """
    library = importlib.import_module("transformers" if part.of_transformers else "diffusers")
    try:
        return getattr(library, part.kind).from_pretrained(part.folder, **options)
    # diffusers checks no types: a wrong value in a config can raise nearly anything
    except Exception as error:
        raise ValueError(
            f"{model} but its weights and config in {part.folder} do not load: {first_line(error)}; "
            "save the model again with diffusers' save_pretrained"
        ) from error


def _unexpected(names: Collection[str]) -> list[str]:
    """Tensors that no module takes, without the positions that old files of CLIP hold and that are counted anew."""
    return [name for name in names if not name.endswith("embeddings.position_ids")]


def _shard_problem(part: Component) -> str:
    """The tensors that an index promises and its shards lack, or the reverse; diffusers believes the index."""
    index, *shards = part.weights
    if not shards:
        return ""
    promised, held = shards_of(part.folder / index).keys(), set[str]()
    for shard in shards:
        held |= _names(part.folder / shard)
    return in_words(promised - held, held - promised, [])


def _names(shard: Path) -> set[str]:
    if shard.suffix == ".safetensors":
        with safe_open(shard, framework="pt") as file:
            return set(file.keys())
    return set(torch.load(shard, map_location="cpu", weights_only=True))


def _aligned(module: Any) -> Any:
    """The module with its weights copied: a mapped file's lie anywhere, and some matrix products round by alignment."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module
