"""LoRA: small trained matrices beside the frozen layers of a network, by peft (arXiv 2106.09685).

A layer of weight W computes (W + alpha/rank · B·A)·x. A and B are fp32 and trained; W is frozen. Left out: dropout,
which would make the policy that samples another one than the policy that is trained, and the initialisations that
change W (PiSSA, OLoRA, LoftQ): B starts at 0, so that a run starts at its pretrained model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hrf_fast.noise import noise_key
from hrf_fast.policies.network import DTYPES
from hrf_fast.registry import nearest
from hrf_fast.weights import judge, read_tensors

# peft's name of the one adapter
ADAPTER = "default"
# diffusers' name of a file of adapters
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
_INITS: dict[str, Any] = {"gaussian": "gaussian", "kaiming": True}
# autocast rounds their weights at each use
_LAYERS = (nn.Linear, nn.Conv2d)


class WrongTarget(ValueError):
    """A target of lora.targets that the denoiser does not have."""


def add_adapters(
    unet: Any,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str],
    init: str = "gaussian",
    base_precision: str = "fp32",
    seed: int = 0,
) -> None:
    """Freeze a denoiser and put an adapter beside each of its target layers.

    Args:
        unet: a UNet or transformer of diffusers in fp32.
        rank: of A and B; alpha: the scale's numerator, None for the rank.
        targets: endings of the names of layers, such as to_q or to_out.0.
        init: of A, whose columns are normal with std 1/rank (gaussian) or uniform (kaiming); B is 0.
        base_precision: see `store_frozen`; seed: of A, equal on every rank and device.

    Raises:
        WrongTarget: a target that ends the name of no linear or convolution layer; names those that there are.
    """
    import peft

    _check_targets(unet, targets)
    options: dict[str, Any] = {"r": rank, "lora_alpha": rank if alpha is None else alpha}
    config = peft.LoraConfig(target_modules=list(targets), init_lora_weights=_INITS[init], **options)
    unet.requires_grad_(False)
    # peft draws from the global generator of the CPU
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(noise_key(seed, 0, "adapters") >> 1)
        if hasattr(unet, "add_adapter"):
            unet.add_adapter(config, ADAPTER)
        else:
            peft.inject_adapter_in_model(config, unet, ADAPTER)
    for layer in adapted_layers(unet).values():
        # fp32 for A, which autocast would round again at once: a copy of every input
        layer.cast_input_dtype_enabled = False
    store_frozen(unet, base_precision)


def store_frozen(unet: nn.Module, precision: str) -> None:
    """Keep the frozen weights of linear and convolution layers in a precision.

    Under autocast to that precision no number changes, since autocast rounds these weights at each use. Normalisations
    stay in fp32.
    """
    dtype = DTYPES[precision]
    for module in unet.modules():
        for parameter in module.parameters(recurse=False) if isinstance(module, _LAYERS) else ():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)


def adapted_layers(unet: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name; none for a denoiser that is trained whole."""
    if not hasattr(unet, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def switched_off(unet: nn.Module) -> Iterator[None]:
    """A block in which the denoiser computes without its adapters; a no-op for one that has none."""
    layers = adapted_layers(unet).values()
    try:
        for layer in layers:
            # not peft's enable_adapters: it would take requires_grad from adapters that kept graphs and ZeRO rely on
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def merged(unet: Any) -> Any:
    """The denoiser as diffusers knows it: a copy in fp32 on the CPU with W + alpha/rank · B·A for W.

    Returns:
        The denoiser itself where it has no adapters.
    """
    if not (layers := adapted_layers(unet)):
        return unet
    state = {
        name.replace(".base_layer.", "."): _saved(tensor)
        for name, tensor in unet.state_dict().items()
        if ".lora_" not in name
    }
    for name, layer in layers.items():
        state[f"{name}.weight"] += _saved(layer.get_delta_weight(ADAPTER))
    with torch.device("meta"):
        copy = type(unet).from_config(unet.config)
    copy.load_state_dict(state, assign=True)
    return copy


def save_adapters(unet: Any, folder: Path, pipeline: Any) -> None:
    """Write the adapters as a file that the pipeline's `load_lora_weights` reads, with alpha/rank in B.

    A reader that knows no header of this kind takes alpha for the rank. The header has what is needed alone, since peft
    refuses fields of a later peft.

    Args:
        pipeline: a class of diffusers that has `save_lora_weights`.
    """
    config = unet.peft_config[ADAPTER]
    # targets are a set, whose order differs between processes
    settings = {"r": config.r, "lora_alpha": config.r, "target_modules": sorted(config.target_modules)}
    weights = {saved: _saved(unet.get_parameter(name)) for name, saved in _names(unet).items()}
    for name in weights:
        if _is_b(name):
            weights[name] *= config.lora_alpha / config.r
    part = next(name for name in ("transformer", "unet") if name in pipeline._lora_loadable_modules)
    layers = {f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": settings}
    pipeline.save_lora_weights(folder, **layers)


@torch.no_grad()
def load_adapters(unet: Any, folder: Path) -> None:
    """Put the adapters of a file that `save_adapters` wrote into a denoiser with adapters of equal rank and targets.

    Raises:
        ValueError: the file is damaged, or a tensor is missing, unexpected, of another shape or not finite.
    """
    file, names = folder / LORA_WEIGHTS, _names(unet)
    # after the part of the pipeline
    read = read_tensors(file, "restore the run's folder")
    tensors = {name.partition(".")[2]: tensor for name, tensor in read.items()}
    if problem := judge({saved: unet.get_parameter(name).shape for name, saved in names.items()}, tensors):
        raise ValueError(f"{file} can't be used for the adapters of section lora: {problem}; restore the run's folder")
    config, settings = unet.peft_config[ADAPTER], _header(file)
    scale = config.lora_alpha / config.r / (settings.get("lora_alpha", config.r) / settings.get("r", config.r))
    for name, saved in names.items():
        unet.get_parameter(name).copy_(tensors[saved] / scale if _is_b(saved) else tensors[saved])


def _header(file: Path) -> dict[str, Any]:
    """The settings of adapters in the header of their file, by their names in peft; empty where it has none."""
    with safe_open(file, framework="pt") as opened:
        settings = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return {name.partition(".")[2]: value for name, value in settings.items()}


def _is_b(name: str) -> bool:
    return name.endswith(".lora_B.weight")


def _names(unet: nn.Module) -> dict[str, str]:
    """The names of adapters in a file, by those of the parameters."""
    names = (name for name, _ in unet.named_parameters() if ".lora_" in name)
    return {name: name.replace(f".{ADAPTER}.", ".") for name in names}


def _saved(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape).copy_(tensor)


def _check_targets(unet: nn.Module, targets: Sequence[str]) -> None:
    layers = {name for name, module in unet.named_modules() if isinstance(module, _LAYERS)}
    for target in targets:
        matches = {name for name, _ in unet.named_modules() if f".{name}".endswith(f".{target}")}
        if not matches or not matches <= layers:
            endings = sorted({_ending(name) for name in layers})
            raise WrongTarget(
                f"lora.targets has {target!r}{nearest(target, endings)}, which ends the name of no linear or "
                f"convolution layer of model.name; its layers end in {', '.join(endings)}"
            )


def _ending(name: str) -> str:
    """The last part of a layer's name, with the part before where it is a number, as in to_out.0."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
