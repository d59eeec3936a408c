"""Networks of transformers from a folder or the hub: one loader for features, classifiers and CLIP embeddings.

A network runs frozen, in fp32, behind its own image processor. One picture goes through both while they load, so that
settings which do not fit the network are refused before a run starts.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hrf_fast.hub import find_folder, find_local_folder, first_line
from hrf_fast.vision.base import BATCH, in_batches
from hrf_fast.vision.processor import FILES, Source, import_transformers, load_processor, process
from hrf_fast.weights import in_words, not_finite

# a file or its shards, the better kind first; files of a variant have another name
WEIGHTS = (("model.safetensors", "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin"))
# the trial picture is not square, so that the processor's handling of shape is tried too
TRIAL = (1, 3, 48, 64)


def find_network(
    option: str, value: Any, shipped: Mapping[str, Path] | None = None, *, also: Sequence[str] = ()
) -> Source:
    """The folder of a transformers network, downloaded if `value` is a hub id; `shipped` as in `find_folder`.

    `also` names other files to download.

    Raises:
        ImportError: transformers is not installed.
        ValueError: neither a folder nor a hub id that can be downloaded.
    """
    find_local_folder(option, value, shipped=shipped)
    # before the download, which would be for nothing
    import_transformers(option, value)
    files = ("config.json", "*.index.json", *FILES, *also)

    def choose(folder: Path, names: Collection[str]) -> list[str]:
        for patterns in WEIGHTS:
            if weights := [name for pattern in patterns for name in fnmatch.filter(names, pattern)]:
                return weights
        kinds = " or ".join(patterns[0] for patterns in WEIGHTS)
        raise ValueError(f"{option} is {value!r}, which has no {kinds}; name a network that transformers loads")

    return Source(option, value, find_folder(option, value, shipped=shipped, files=files, choose=choose))


def load_config(source: Source) -> Any:
    """The transformers config of a network.

    Raises:
        ValueError: no config, or one that this transformers does not know.
    """
    transformers = import_transformers(source.option, source.value)
    try:
        return transformers.AutoConfig.from_pretrained(str(source.folder), trust_remote_code=False)
    except Exception as error:
        problem = f"whose config.json does not load: {first_line(error)}"
        raise source.error(problem, "give a folder that save_pretrained wrote, or another hub id") from error


def load_network(
    source: Source, kind: str, config: Any, *, optional: Callable[[str], bool] = lambda name: False
) -> tuple[nn.Module, set[str]]:
    """Load a network of the transformers class `kind` in fp32, frozen and in evaluation mode.

    Args:
        optional: whether the weights of this name may be missing from the checkpoint.

    Returns:
        The network on the CPU, and the names of the optional weights that are missing.

    Raises:
        ValueError: no weights, weights that do not fit the config or are not finite, or a checkpoint without some of
            them, which transformers would make up at random.
    """
    transformers = import_transformers(source.option, source.value)
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    # the text half of a CLIP is left out on purpose, and 200 lines of warning would say so
    logging.set_verbosity_error()
    try:
        # takes safetensors where there is one, and otherwise a pickle without code
        network, report = getattr(transformers, kind).from_pretrained(
            str(source.folder),
            config=config,
            weights_only=True,
            trust_remote_code=False,
            # to be told their names
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        problem = f"whose weights could not be loaded as {kind}: {first_line(error)}"
        raise source.error(problem, "download them again, or name another network") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = set(report["missing_keys"])
    problem = in_words(
        [name for name in missing if not optional(name)],
        _stray_layers(network, report["unexpected_keys"]),
        report["mismatched_keys"],
    ) or not_finite(network.state_dict())
    if problem:
        raise source.error(
            f"whose weights can't be used as {type(network).__name__}: {problem}",
            "name a network that was trained for this, with its own config.json",
        )
    return network.float().eval().requires_grad_(False), missing


def _stray_layers(network: Any, unexpected: Collection[str]) -> list[str]:
    """Tensors of layers beyond those of the config; other unexpected ones are of heads and halves that are left out."""
    stacks = [re.escape(name) for name, module in network.named_modules() if isinstance(module, nn.ModuleList)]
    layer = re.compile(rf"({re.escape(network.base_model_prefix)}\.)?({'|'.join(stacks)})\.\d+\.")
    return [name for name in unexpected if layer.match(name)]


class HubNetwork:
    """Images [B, 3, H, W] in [0, 1] -> what `read` takes from the network's output, [B, D] fp32.

    Raises:
        ValueError: processor and network do not fit each other.
    """

    def __init__(
        self,
        source: Source,
        network: nn.Module,
        processor: Any,
        read: Callable[[Any], Tensor],
        *,
        device: torch.device | str,
        batch_size: int = BATCH,
    ) -> None:
        self._network, self._processor, self._read = network.to(device), processor, read
        self._device, self._batch_size = torch.device(device), batch_size
        try:
            outputs = self(torch.zeros(TRIAL))
            if outputs.dim() != 2 or len(outputs) != TRIAL[0]:
                raise ValueError(f"an output of shape {list(outputs.shape)} for one image")
        except Exception as error:
            raise source.error(
                f"whose image settings do not fit its network, which fails for an image of {TRIAL[2]} x {TRIAL[3]} "
                f"pixels with {first_line(error)}",
                f"correct {FILES[0]} in a local copy, or name another network",
            ) from error

    def __call__(self, images: Tensor) -> Tensor:
        return in_batches(self._forward, images, self._device, self._batch_size)

    def _forward(self, images: Tensor) -> Tensor:
        return self._read(self._network(pixel_values=process(self._processor, images).to(self._device)))


class HubFeatures:
    """The pooled output of a transformers vision network; of CLIP and its kind the vision half, before its projection.

    A network whose checkpoint has no pooler gives its class token, and a convolutional one the mean of its last map.
    """

    def __init__(self, source: Source, device: torch.device | str) -> None:
        self.name = source.value
        # classification checkpoints have no pooler: a freshly initialised one would give random features
        network, missing = load_network(
            source, "AutoModel", load_config(source), optional=lambda name: "text_model" in name or "pooler" in name
        )
        vision = getattr(network, "vision_model", network)
        if vision.main_input_name != "pixel_values":
            problem = f"a {type(vision).__name__}, which does not look at images"
            raise source.error(problem, "name a vision network")
        has_pooler = not any("pooler" in name for name in missing)
        processor = load_processor(source) or _assume_processor(source, vision.config)

        def read(output: Any) -> Tensor:
            if has_pooler and output.get("pooler_output") is not None:
                return output.pooler_output.flatten(1)
            hidden: Tensor = output.last_hidden_state
            # tokens [B, 1 + N, D]: the class token; a feature map [B, D, H, W]: its mean
            return hidden[:, 0] if hidden.dim() == 3 else hidden.mean((2, 3))

        self._pooled = HubNetwork(source, vision, processor, read, device=device)

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] floating point in [0, 1] -> [B, D] fp32, without gradient."""
        return self._pooled(images)


def _assume_processor(source: Source, config: Any) -> Any:
    """The processor of a network that was saved without one: the network's square, mean and std 0.5."""
    side = getattr(config, "image_size", None) or 224
    height, width = side if isinstance(side, list | tuple) else (side, side)
    warnings.warn(
        f"{source.option} is {source.value!r}, which has no {FILES[0]}: images become {height} x {width} pixels and "
        "are normalised with mean 0.5 and std 0.5",
        stacklevel=4,
    )
    transformers = import_transformers(source.option, source.value)
    colours = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return transformers.ViTImageProcessorPil(size={"height": height, "width": width}, resample=3, **colours)
