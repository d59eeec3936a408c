"""Captioned drawings behind `peeps`: `python pretraining/peeps_data.py --data some/folder` draws them into two files.

The parts are those of the `open-peeps` style of DiceBear (packages dicebear-core, dicebear-styles, resvg-py), a remix
of Open Peeps by Pablo Stanley, CC0 1.0. They are altered here: twelve heads, five faces and three things before the
eyes are used, and the ink of every hairstyle takes the hair colour, so that each style comes in each colour. There is
no facial hair: at 64 pixels the moustaches are as thin as a mouth.
"""

import argparse
import io
import json
import random
from pathlib import Path

import numpy as np

PIXELS = 64
TRAINING, HELD_OUT = 10_000, 1_536

# values of each attribute: in the style's own names of its variants, or as six hex digits
HAIR = {
    "short": ("short5", "pomp"),
    "long": ("long", "longBangs"),
    "bob": ("bangs2",),
    "curly": ("longCurly",),
    "afro": ("afro",),
    "mohawk": ("mohawk",),
    "bun": ("grayBun",),
    "bald": ("noHair1",),
    "hat": ("hatHip",),
    "turban": ("turban",),
}
NO_HAIR = ("bald", "hat", "turban")
HAIR_COLOUR = {
    "none": "1d1512",
    "black": "1d1512",
    "brown": "7a4630",
    "blonde": "e6c25e",
    "red": "c93305",
    "gray": "9b9ba3",
    "pink": "f27fb2",
    "blue": "3f6fd8",
}
# one face each, told apart by its mouth alone: sunglasses hide the eyes
EXPRESSION = {"smiling": "smile", "laughing": "smileBig", "angry": "rage", "sad": "solemn", "in love": "lovingGrin1"}
ACCESSORIES = {"none": None, "glasses": "glasses3", "sunglasses": "sunglasses", "eyepatch": "eyepatch"}
SKIN = {"light": "ffdbb4", "tan": "d08b5b", "dark": "694d3d"}
SHIRT = {
    "red": "e0483e",
    "yellow": "f7d038",
    "green": "4fb34f",
    "blue": "4a7fe0",
    "purple": "9b59c9",
    "white": "ffffff",
    "black": "2b2b2b",
}
BACKGROUND = {
    "blue": "b6e3f4",
    "pink": "ffc9d6",
    "yellow": "fff0a0",
    "green": "c4edb4",
    "purple": "d3c5f5",
    "white": "f6f6f6",
    "orange": "ffd2a0",
}
ATTRIBUTES = {
    "hair": list(HAIR),
    "hair_colour": list(HAIR_COLOUR),
    "expression": list(EXPRESSION),
    "accessories": list(ACCESSORIES),
    "skin": list(SKIN),
    "shirt": list(SHIRT),
    "background": list(BACKGROUND),
}
# half of the people wear nothing before their eyes
ACCESSORY_SHARES = (3, 1, 1, 1)


def random_person(random_: random.Random) -> dict[str, str]:
    """One value of every attribute; the head chooses whether there is hair that has a colour."""
    person = {attribute: random_.choice(values) for attribute, values in ATTRIBUTES.items()}
    person["accessories"] = random_.choices(list(ACCESSORIES), ACCESSORY_SHARES)[0]
    colours = [colour for colour in HAIR_COLOUR if colour != "none"]
    person["hair_colour"] = "none" if person["hair"] in NO_HAIR else random_.choice(colours)
    return person


class Artist:
    """Draws people; opens the style once."""

    def __init__(self) -> None:
        import dicebear_styles
        from dicebear import Style

        parts = json.loads((Path(next(iter(dicebear_styles.__path__))) / "open-peeps.json").read_text())
        heads = parts["components"]["head"]["variants"]
        for variant in (variant for hair, variants in HAIR.items() if hair not in NO_HAIR for variant in variants):
            heads[variant] = json.loads(json.dumps(heads[variant]).replace('"name": "ink"', '"name": "headContrast"'))
        self.style = Style(parts)

    def draw(self, person: dict[str, str], random_: random.Random) -> np.ndarray:
        """A person as [64, 64, 3] uint8; `random_` chooses between variants of a hairstyle.

        Drawn at four times the size and averaged down, so that thin lines become grey and not jagged.
        """
        import resvg_py
        from dicebear import Avatar
        from PIL import Image

        accessory = ACCESSORIES[person["accessories"]]
        options = {
            "seed": "peep",
            "headVariant": [random_.choice(HAIR[person["hair"]])],
            "headContrastColor": [HAIR_COLOUR[person["hair_colour"]]],
            "expressionVariant": [EXPRESSION[person["expression"]]],
            "skinColor": [SKIN[person["skin"]]],
            "clothingColor": [SHIRT[person["shirt"]]],
            "backgroundColor": [BACKGROUND[person["background"]]],
            # unless it is 0 or 100, chance decides whether the part is drawn
            "accessoriesProbability": 100 if accessory else 0,
            "facialHairProbability": 0,
            "maskProbability": 0,
        }
        if accessory:
            options["accessoriesVariant"] = [accessory]
        svg = Avatar(self.style, options).to_json()["svg"]
        drawing = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * PIXELS))))
        return np.asarray(drawing.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BOX))


def labels_of(people: list[dict[str, str]]) -> np.ndarray:
    """[N, attributes] int64, indices into `ATTRIBUTES`."""
    return np.array([[values.index(p[name]) for name, values in ATTRIBUTES.items()] for p in people], np.int64)


def person_of(label: np.ndarray) -> dict[str, str]:
    """One row of `labels_of` as names."""
    return {name: values[index] for (name, values), index in zip(ATTRIBUTES.items(), label, strict=True)}


def load(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 64, 64, 3] uint8 and labels [N, attributes] int64; split: training or held_out."""
    arrays = np.load(folder / f"{split}.npz")
    return arrays["images"], arrays["labels"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder for training.npz and held_out.npz")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.data.mkdir(parents=True, exist_ok=True)
    artist, random_ = Artist(), random.Random(arguments.seed)
    training: set[tuple[str, ...]] = set()
    for split, count in (("training", TRAINING), ("held_out", HELD_OUT)):
        people: list[dict[str, str]] = []
        while len(people) < count:
            person = random_person(random_)
            # a held-out person differs from every training one in some attribute
            if tuple(person.values()) not in training:
                people.append(person)
        images = np.stack([artist.draw(person, random_) for person in people])
        np.savez(arguments.data / f"{split}.npz", images=images, labels=labels_of(people))
        if split == "training":
            training = {tuple(person.values()) for person in people}
        print(f"{split}: {count:,} drawings, {len({tuple(p.values()) for p in people}):,} different people", flush=True)


if __name__ == "__main__":
    main()
