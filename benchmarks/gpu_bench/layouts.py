"""Layouts of published models with random weights, written where no model can be downloaded; tiny ones for a dry run.

Weights are one block of normal numbers over and over, each matrix scaled by its inputs: a file is written as fast as
the disk takes it, and activations keep their size. A GPU computes such numbers at its usual speed, not zeros.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.training_bench.models import make_model
from hrf_fast.policies.component import stems
from hrf_fast.policies.files import read_model
from hrf_fast.policies.untrained import _untrained

# a prime, so that no two rows of a matrix are equal
_BLOCK = 1_000_003
_TEXT = {"intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
_VAE = {"block_out_channels": [4, 4, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}
_UNET = {"norm_num_groups": 4, "layers_per_block": 1}
# what shrinks a published config: the kinds of blocks and what steers them stay
_TINY: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": {**_UNET, "sample_size": 8, "block_out_channels": [8, 8, 16, 16], "cross_attention_dim": 16},
        "vae": _VAE,
        "text_encoder": {**_TEXT, "hidden_size": 16, "projection_dim": 16},
    },
    "sdxl": {
        "unet": {
            **_UNET,
            "sample_size": 8,
            "block_out_channels": [8, 8, 16],
            "attention_head_dim": [1, 2, 4],
            "cross_attention_dim": 24,
            "transformer_layers_per_block": 1,
            "addition_time_embed_dim": 8,
            # six time ids and the pooled embedding
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
        "vae": _VAE,
        "text_encoder": {**_TEXT, "hidden_size": 8, "projection_dim": 8},
        "text_encoder_2": {**_TEXT, "hidden_size": 16, "projection_dim": 16},
    },
}


def write_layout(kind: str, folder: Path, *, tiny: bool = False) -> str:
    """Write a diffusers folder of celebahq, sd15 or sdxl below `folder`; returns the value of model.name."""
    if kind == "celebahq":
        return make_model("tiny" if tiny else kind, folder, seed=0)
    # the tests read the same configs
    from tests.text_models import make_tokenizer
    from tests.true_models import write_true_model

    target = write_true_model(folder / kind, kind)
    for part, changes in _TINY[kind].items() if tiny else ():
        path = target / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for name in ("tokenizer", "tokenizer_2"):
        if (target / name).is_dir():
            make_tokenizer(length=77).save_pretrained(target / name)
    write_weights(target)
    return str(target)


def write_weights(folder: Path) -> None:
    """Write random fp32 weights for every network of a folder that holds configs alone."""
    for part in read_model(str(folder), weights=False).parts.values():
        if part.has_weights:
            with torch.device("meta"):
                tensors = _untrained(part).state_dict()
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.is_floating_point()}
            _write(part.folder / f"{stems(part)['safetensors']}.safetensors", shapes)


def _write(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file, one tensor after the other: a model of 10 GB never is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        first, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.write(_values(name, shape, block).numpy().tobytes())


def _values(name: str, shape: tuple[int, ...], block: torch.Tensor) -> torch.Tensor:
    """Numbers of std 1/sqrt(inputs) for a matrix, ones for the scale of a normalisation, zeros for a bias."""
    count = math.prod(shape)
    if len(shape) < 2:
        return torch.full((count,), float(name.endswith("weight")))
    return block.repeat(-(-count // len(block)))[:count] / math.sqrt(count / shape[0])
