"""Loading vision networks from a hub id or a folder, and preparing images for them in plain torch.

Preparation follows the network's own preprocessor_config.json and stays on the images' device and in float, where
Pillow would round to bytes after resizing; torchvision is not needed. A setting that is not implemented is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrf_fast.rewards.registry import require

# Pillow's resampling codes, as preprocessor_config.json stores them
RESAMPLING = {2: "bilinear", 3: "bicubic"}
SUPPORTED = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}


def unavailable(option: str, source: str, error: Exception) -> OSError:
    """One error for everything that a missing network, id or file can raise."""
    cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else type(error).__name__
    return OSError(
        f"{option} is {source!r}, which could not be loaded ({cause}); check the id, or download it on a connected "
        "machine (hf download) and give the local path"
    )


def check_batch_size(option: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{option} is {value!r}; use a whole number of at least 1")


def check_text(option: str, value: Any, expected: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{option} is {value!r}; use {expected}, as text")


def check_folder(option: str, source: str) -> bool:
    """Whether `source` is a local folder rather than a hub id.

    Raises:
        FileNotFoundError: it is written like a path, and there is no such folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return True
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise FileNotFoundError(
            f'{option} is {source!r}, which is neither a folder nor a hub id of the form "owner/name"; '
            "give the folder that holds config.json and model.safetensors"
        )
    return False


def load_config(option: str, source: str) -> Any:
    """The transformers config of a hub id or folder.

    Raises:
        OSError: it is not there and cannot be downloaded, in one line.
    """
    transformers = require("transformers", reward=option.split(".")[0])
    if check_folder(option, source):
        source = str(Path(source).expanduser())
    try:
        return transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise unavailable(option, source, error) from None


def load_network(option: str, source: str, network_class: Any, config: Any, device: torch.device | str) -> nn.Module:
    """Load weights in fp32, frozen, in evaluation mode.

    Raises:
        OSError: no weights, or weights that do not fit the config.
        ValueError: the file lacks some of the network's weights, which transformers would make up at random.
    """
    path = str(Path(source).expanduser()) if check_folder(option, source) else source
    logging = require("transformers.utils.logging", reward=option.split(".")[0])
    verbosity = logging.get_verbosity()
    # the text half of a CLIP is left out on purpose, and 200 lines of warning would say so
    logging.set_verbosity_error()
    try:
        # takes safetensors where there is one, and otherwise a pickle without code
        network, report = network_class.from_pretrained(
            path, config=config, weights_only=True, output_loading_info=True
        )
    except Exception as error:
        raise unavailable(option, source, error) from None
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{option} is {source!r}, whose weights lack {len(missing)} tensors of {network_class.__name__} "
            f"({', '.join(missing[:3])}…); give a network that was trained for this"
        )
    return network.to(device, torch.float32).eval().requires_grad_(False)


def fetch(option: str, repo: str, filename: str) -> Path | None:
    """Path of one file of a hub repository, from the cache or downloaded; None if the repository has no such file.

    Raises:
        OSError: the hub is out of reach and the cache does not have it.
    """
    hub = require("huggingface_hub", reward=option.split(".")[0])
    try:
        return Path(hub.hf_hub_download(repo, filename))
    except hub.errors.LocalEntryNotFoundError as error:
        raise unavailable(option, f"{repo}:{filename}", error) from None
    except hub.errors.EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise unavailable(option, f"{repo}:{filename}", error) from None


def read_preprocessor(option: str, source: str) -> dict[str, Any] | None:
    """The image settings that come with a network, or None if it has no such file."""
    is_folder = check_folder(option, source)
    # a whole processor is saved in the second file, its image part under a key
    for filename in ("preprocessor_config.json", "processor_config.json"):
        path = Path(source).expanduser() / filename if is_folder else fetch(option, source, filename)
        if path is not None and path.is_file():
            try:
                settings = json.loads(path.read_text(encoding="utf-8"))
                return dict(settings.get("image_processor", settings))
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{option} is {source!r}, whose {filename} is not a JSON object ({error}); download it again"
                ) from error
    return None


@dataclass(frozen=True)
class Preprocessor:
    """[B, 3, H, W] in [0, 1] -> what the network reads: resize, crop the centre, scale, normalise.

    `size` is the shorter side, or (height, width); `crop` is (height, width) or None; `scale` multiplies [0, 1].
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"
    scale: float = 1.0

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], option: str) -> Preprocessor:
        """Read the keys of a preprocessor_config.json.

        Raises:
            ValueError: a setting that is not implemented here; the message names it.
        """

        def refuse(key: str, rule: str) -> ValueError:
            return ValueError(f"{option}: preprocessor_config.json has {key} = {settings.get(key)!r}; {rule}")

        for key, value in settings.items():
            unknown = key.startswith("do_") and key not in SUPPORTED
            if value and (unknown or key in ("crop_pct", "rescale_offset", "include_top")):
                raise refuse(key, "this is not implemented; use another network or a module:function reward")
        if not settings.get("do_resize", True):
            raise refuse("do_resize", "a network of fixed size needs resizing")
        if settings.get("resample", 2) not in RESAMPLING:
            raise refuse("resample", f"one of {RESAMPLING} is implemented")
        cropped = settings.get("do_center_crop", False)
        size, crop = settings.get("size"), settings.get("crop_size", settings.get("size"))
        # a bare number is the shorter side of networks that crop, and a square for the others
        if isinstance(size, int):
            size = {"shortest_edge": size} if cropped else {"height": size, "width": size}
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        if not isinstance(size, dict) or size.keys() not in ({"shortest_edge"}, {"height", "width"}):
            raise refuse("size", "use a shortest_edge, or a height and a width")
        if cropped and (not isinstance(crop, dict) or crop.keys() != {"height", "width"}):
            raise refuse("crop_size", "use a height and a width")
        window = (crop["height"], crop["width"]) if cropped else None
        box = (size["shortest_edge"],) * 2 if "shortest_edge" in size else (size["height"], size["width"])
        if window and (window[0] > box[0] or window[1] > box[1]):
            raise refuse("crop_size", f"it must fit into size = {size}")
        mean: Any = [0.0, 0.0, 0.0]
        std: Any = [1.0, 1.0, 1.0]
        if settings.get("do_normalize", True):
            mean, std = settings.get("image_mean"), settings.get("image_std")
        for key, value in (("image_mean", mean), ("image_std", std)):
            if not isinstance(value, list) or len(value) != 3 or not all(type(v) in (int, float) for v in value):
                raise refuse(key, "use three numbers, one per colour channel")
        factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
        return cls(
            size=box[0] if "shortest_edge" in size else box,
            crop=window,
            mean=tuple(mean),
            std=tuple(std),
            mode=RESAMPLING[settings.get("resample", 2)],
            scale=255 * factor,
        )

    def __call__(self, images: Tensor) -> Tensor:
        images = images.float()
        height, width = images.shape[-2:]
        if isinstance(self.size, int):
            short = min(height, width)
            size = (self.size * height // short, self.size * width // short)
        else:
            size = self.size
        if size != (height, width):
            # cubic filters overshoot; bytes cannot, and neither do we
            images = F.interpolate(images, size, mode=self.mode, antialias=True).clamp(0, 1)
        if self.crop is not None:
            top, left = (size[0] - self.crop[0]) // 2, (size[1] - self.crop[1]) // 2
            images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images * self.scale - mean) / std
