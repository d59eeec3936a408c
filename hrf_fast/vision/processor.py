"""The image processor that a network of transformers was saved with: resize, crop, rescale and normalise.

The processors run on Pillow and numpy (transformers' backend "pil"): torchvision is not needed, and a reward does not
depend on whether it is installed. They read bytes, as the networks did when they were trained, so images are rounded
to 255 levels first.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from hrf_fast.hub import first_line
from hrf_fast.vision.base import to_bytes

# a processor saved with its tokenizer is in the second file, its image part under a key
FILES = ("preprocessor_config.json", "processor_config.json")
# keys that name classes, and change nothing in what a processor does
CLASS_NAMES = {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map"}


@dataclass(frozen=True)
class Source:
    """The folder of a network, with the option and value that name it in errors."""

    option: str
    value: str
    folder: Path

    def error(self, problem: str, way_out: str) -> ValueError:
        """An error about this network."""
        return ValueError(f"{self.option} is {self.value!r}, {problem}; {way_out}")


def import_transformers(option: str, value: str) -> ModuleType:
    """Import transformers.

    Raises:
        ImportError: not installed; has the install line.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"{option} is {value!r}, which needs transformers, which does not import ({error}); "
            'install it with: pip install "transformers>=5.4"'
        ) from error


def load_processor(source: Source) -> Any | None:
    """The image processor of a network, or None if its folder has no settings for images.

    Raises:
        ValueError: settings that are damaged, need code from the repository, or that the processor would ignore.
    """
    if not any((source.folder / name).is_file() for name in FILES):
        return None
    transformers = import_transformers(source.option, source.value)
    try:
        settings = transformers.ImageProcessingMixin.get_image_processor_dict(str(source.folder))[0]
        processor = transformers.AutoImageProcessor.from_pretrained(
            str(source.folder), backend="pil", trust_remote_code=False
        )
    # transformers checks few types: a wrong value in the file can raise nearly anything
    except Exception as error:
        problem = f"whose image settings ({' or '.join(FILES)}) do not load: {first_line(error)}"
        raise source.error(problem, "download them again, or name another network") from error
    handled = {*processor.valid_kwargs.__annotations__, *CLASS_NAMES}
    ignored = {key: value for key, value in settings.items() if value and key not in handled and key[0] != "_"}
    if ignored:
        listed = ", ".join(f"{key} = {value!r}" for key, value in ignored.items())
        raise source.error(
            f"whose image settings have {listed}, which {type(processor).__name__} does not read",
            "name another network, or a local copy of this one without them if they change nothing",
        )
    return processor


def process(processor: Any, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] -> the network's pixel_values on the CPU."""
    arrays = list(to_bytes(images).numpy())
    pixels: Tensor = processor(images=arrays, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    return pixels
