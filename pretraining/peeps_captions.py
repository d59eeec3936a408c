"""Captions of the people of `peeps_data`, and the tokenizer: `python pretraining/peeps_captions.py --data some/folder`.

A caption names each attribute in one of a few ways, or leaves it open. Whoever wears nothing before the eyes is said to
have "no glasses": what a prompt does not mention may be drawn either way. The tokenizer is CLIP's, trained on some
eighty words: each is one token, and any other text falls into bytes, so none is unknown.
"""

import argparse
import json
import random
import re
from pathlib import Path

import numpy as np
from peeps_data import ATTRIBUTES, NO_HAIR, person_of, random_person
from torch import Tensor

LENGTH = 32  # tokens of a prompt, its start and end included; the longest caption has 31
# the share of attributes that a caption leaves open, drawn per caption
OPEN = (0.0, 0.0, 0.15, 0.4)
CAPTIONS = 6  # per drawing

COLOUR_WORDS = {"blonde": ("blonde", "golden"), "red": ("red", "ginger"), "gray": ("gray", "grey")}
HAIR_WORDS = {
    "short": ("short {} hair",),
    "long": ("long {} hair",),
    "bob": ("a {} bob",),
    "curly": ("curly {} hair",),
    "afro": ("a {} afro",),
    "mohawk": ("a {} mohawk",),
    "bun": ("a {} bun",),
    "bald": ("a bald head", "no hair"),
    "hat": ("a hat",),
    "turban": ("a turban",),
}
EXPRESSION_WORDS = {
    "smiling": ("smiling", "happy"),
    "laughing": ("laughing", "grinning"),
    "angry": ("angry", "furious"),
    "sad": ("sad", "unhappy"),
    "in love": ("in love", "with heart eyes"),
}
ACCESSORY_WORDS = {
    "none": ("no glasses",),
    "glasses": ("glasses", "spectacles"),
    "sunglasses": ("sunglasses", "shades"),
    "eyepatch": ("an eyepatch",),
}
SKIN_WORDS = {"light": ("light skin", "pale skin"), "tan": ("tan skin", "tanned skin"), "dark": ("dark skin",)}
# words that a user may write besides: one token each, though no drawing taught them
MORE_WORDS = ["woman", "man", "girl", "boy", "old", "young", "people", "photo", "image", "eyes", "the", "without"]


def caption(person: dict[str, str], random_: random.Random, left_open: float) -> tuple[str, dict[str, str]]:
    """A sentence, and the attributes that it names; each is left out with probability `left_open`."""
    named = {name: value for name, value in person.items() if random_.random() >= left_open}
    # a bare head says that there is no hair colour, and a colour that there is some hair
    if person["hair"] in NO_HAIR:
        named.pop("hair_colour", None)
        if "hair" in named:
            named["hair_colour"] = "none"
    parts, ends = [], []
    if "hair" in named or "hair_colour" in named:
        colour = named.get("hair_colour", "")
        word = "" if colour in ("", "none") else random_.choice(COLOUR_WORDS.get(colour, (colour,)))
        parts.append(random_.choice(HAIR_WORDS[named["hair"]] if "hair" in named else ("{} hair",)).format(word))
    if "skin" in named:
        parts.append(random_.choice(SKIN_WORDS[named["skin"]]))
    if "accessories" in named:
        parts.append(random_.choice(ACCESSORY_WORDS[named["accessories"]]))
    random_.shuffle(parts)
    if "shirt" in named:
        ends.append(f"in a {named['shirt']} {random_.choice(('shirt', 'sweater', 'top'))}")
    if "background" in named:
        where = random_.choice(("on a {} background", "by a {} wall"))
        ends.append(where.format(named["background"]))
    who = random_.choice(("person", "person", "character"))
    if "expression" in named:
        mood = random_.choice(EXPRESSION_WORDS[named["expression"]])
        if " " in mood or random_.random() < 0.3:
            ends.insert(0, mood)
        else:
            who = f"{mood} {who}"
    before = random_.choice(("", "", "a portrait of ", "a drawing of "))
    if parts:
        who += " with " + ", ".join(parts[:-1]) + (" and " if parts[1:] else "") + parts[-1]
    text = re.sub(" +", " ", ", ".join([f"{before}a {who}", *ends]))
    return re.sub(r"\ba (?=[aeio]|unhappy)", "an ", text), named


def full_captions(labels: np.ndarray, seed: int) -> list[str]:
    """One caption per row of labels that names every attribute."""
    random_ = random.Random(seed)
    return [caption(person_of(label), random_, 0.0)[0] for label in labels]


def random_captions(labels: np.ndarray, count: int, seed: int) -> tuple[list[str], np.ndarray]:
    """`count` captions for each row of labels, some attributes left open.

    Returns:
        [N * count] captions, those of a row together; and what each says, [N * count, attributes] int64: the index of
        the value, or the number of values where it says nothing.
    """
    random_ = random.Random(seed)
    texts, said_labels = [], []
    for label in labels:
        for _ in range(count):
            text, named = caption(person_of(label), random_, random_.choice(OPEN))
            texts.append(text)
            said_labels.append(
                [values.index(named[name]) if name in named else len(values) for name, values in ATTRIBUTES.items()]
            )
    return texts, np.array(said_labels, np.int64)


def tokenize(tokenizer: object, texts: list[str]) -> Tensor:
    """[N, LENGTH] int64, cut and padded as StableDiffusionPipeline does it."""
    return tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def write_tokenizer(folder: Path) -> None:
    """A CLIPTokenizer folder in Stable Diffusion's layout: vocab.json, merges.txt, tokenizer_config.json."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    random_ = random.Random(0)
    texts = [caption(random_person(random_), random_, random_.choice(OPEN))[0] for _ in range(4000)]
    words = sorted({word for text in texts for word in re.findall("[a-z]+", text)} | set(MORE_WORDS))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\p{L}+"), behavior="removed", invert=True)
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
        "do_lower_case": True,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def write_prompts(path: Path, count: int = 64) -> None:
    """Prompts for fine-tuning as JSON lines; each names two to four attributes, which its metadata repeats.

    Glasses are left open, so that a reward for them has something to move.
    """
    random_ = random.Random(3)
    lines: dict[str, str] = {}
    while len(lines) < count:
        text, named = caption(random_person(random_), random_, 0.55)
        if 2 <= len(named) <= 4 and "accessories" not in named:
            lines[text] = json.dumps({"prompt": text, "metadata": {"attributes": named}})
    path.write_text("".join(f"{line}\n" for line in lines.values()))


def main() -> None:
    from transformers import CLIPTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of peeps_data.py; writes tokenizer/ in it")
    parser.add_argument("--prompts", type=Path, help="also write the list of prompts, a .jsonl file")
    arguments = parser.parse_args()
    if arguments.prompts:
        write_prompts(arguments.prompts)
    write_tokenizer(arguments.data / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(arguments.data / "tokenizer")
    random_ = random.Random(1)
    texts = [caption(random_person(random_), random_, random_.choice(OPEN))[0] for _ in range(4000)]
    lengths = sorted(len(tokenizer(text).input_ids) for text in texts)
    split_words = {word for text in texts for word in re.findall("[a-z]+", text) if len(tokenizer.tokenize(word)) > 1}
    print(f"{len(tokenizer)} tokens; a caption has {lengths[2000]} of them, at most {lengths[-1]}")
    print(f"words of several tokens: {sorted(split_words)}", *texts[:8], sep="\n")
    print(tokenizer.tokenize("a photo of an astronaut with red hair!"))


if __name__ == "__main__":
    main()
