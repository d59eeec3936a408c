"""The two real data sets behind the shipped models, as uint8 arrays made from public packages.

`fashion` reads Debian's `dataset-fashion-mnist` (product photos, MIT); `portraits` draws open-peeps faces
(CC0) with the PyPI packages named in README.md. Nothing here is needed to use the shipped models.
"""

import gzip
import io
import json
from pathlib import Path

import numpy as np

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PASTELS = ["b6e3f4", "c0aede", "d1d4f9", "ffd5dc", "ffdfbf", "d4f0c0", "fff3b0", "f7c6c7", "c7ece4", "e8e8e8"]


def fashion(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST padded from 28 to 32 pixels.

    Args:
        split: "train" (60,000 images) or "t10k" (10,000).

    Returns:
        images [N, 32, 32, 1] uint8 and labels [N] uint8.

    Raises:
        FileNotFoundError: the Debian package is not installed.
    """
    if not FASHION_FOLDER.is_dir():
        raise FileNotFoundError(f"{FASHION_FOLDER} is missing; run `apt-get install dataset-fashion-mnist`")
    with gzip.open(FASHION_FOLDER / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(FASHION_FOLDER / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None], labels


def portraits(count: int, first_seed: int = 0, pixels: int = 32) -> np.ndarray:
    """The images of `labelled_portraits`, [count, pixels, pixels, 3] uint8."""
    return labelled_portraits(count, first_seed, pixels)[0]


def labelled_portraits(
    count: int, first_seed: int = 0, pixels: int = 32
) -> tuple[np.ndarray, dict[str, list[str]], np.ndarray]:
    """Draw `count` open-peeps faces, one per seed, on a pastel background chosen by the seed.

    They are random combinations of an artist's hand-drawn parts, not photographs. Drawn at four times the
    size and averaged down, so that thin lines become grey and not jagged.

    Returns:
        images [count, pixels, pixels, 3] uint8; the names of the values of each attribute, "none" where a part
        may be absent, a colour as six hex digits; and labels [count, attributes] int64, indices into those names.
    """
    import dicebear_styles
    import resvg_py
    from dicebear import Avatar, Style
    from PIL import Image

    parts = json.loads((Path(next(iter(dicebear_styles.__path__))) / "open-peeps.json").read_text())
    style, names = Style(parts), _attributes(parts)
    images = np.empty((count, pixels, pixels, 3), np.uint8)
    labels = np.empty((count, len(names)), np.int64)
    for index in range(count):
        options = {"seed": f"peep-{first_seed + index}", "backgroundColor": PASTELS}
        drawn = Avatar(style, options).to_json()
        drawing = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=drawn["svg"], width=4 * pixels))))
        images[index] = np.asarray(drawing.convert("RGB").resize((pixels, pixels), Image.Resampling.BOX))
        for column, (attribute, values) in enumerate(names.items()):
            labels[index, column] = values.index(_value(drawn["options"], attribute))
    return images, names, labels


def _attributes(parts: dict) -> dict[str, list[str]]:
    """{attribute: its possible values} of a dicebear style."""
    names = {"background": list(PASTELS)}
    for colour in ("skin", "clothing", "headContrast"):
        names[colour] = [value.lstrip("#") for value in parts["colors"][colour]["values"]]
    names["headContrast"].insert(0, "none")
    for part in ("head", "expression", "facialHair", "accessories", "mask"):
        optional = ["none"] if "probability" in parts["components"][part] else []
        names[part] = optional + list(parts["components"][part]["variants"])
    return names


def _value(options: dict, attribute: str) -> str:
    if f"{attribute}Variant" in options:
        return options[f"{attribute}Variant"]
    return options.get(f"{attribute}Color", ["none"])[0].lstrip("#")
