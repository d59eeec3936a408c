"""Teach the text encoder of `peeps` what captions say: `python pretraining/train_peeps_text.py --data DATA`.

A CLIPTextModel learns to tell at the end of a caption, and in the padding behind it, which value of every attribute
the caption names, or that it leaves the attribute open. Pictures are not needed, and the UNet that trains on these
embeddings starts with words that mean something.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peeps_captions import CAPTIONS, LENGTH, random_captions, tokenize
from peeps_data import ATTRIBUTES, load
from peeps_training import train
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH, BATCH, RATE = 96, 64, 2e-3


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Readers(nn.Module):
    """One linear classifier per attribute, with one class more for what a caption leaves open."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(values) + 1) for name, values in ATTRIBUTES.items()})

    def forward(self, states: Tensor) -> list[Tensor]:
        """[M, WIDTH] -> logits [M, values + 1] of every attribute."""
        return [head(states) for head in self.heads.values()]


def reading_loss(networks: nn.ModuleDict, tokens: Tensor, named: Tensor, end: int) -> Tensor:
    """Sum over the attributes of the mean negative log-likelihood at every position from the end token on."""
    states = networks["text"](tokens).last_hidden_state
    rows, positions = (tokens == end).nonzero(as_tuple=True)
    logits = networks["readers"](states[rows, positions])
    return torch.stack([F.cross_entropy(values, named[rows, i]) for i, values in enumerate(logits)]).sum()


@torch.no_grad()
def reading_accuracy(networks: nn.ModuleDict, tokens: Tensor, named: Tensor, end: int) -> list[float]:
    """Share of captions whose first end token tells the right value, of every attribute."""
    states = networks["text"](tokens).last_hidden_state
    at_end = states[torch.arange(len(tokens)), (tokens == end).int().argmax(1)]
    return [float((v.argmax(1) == named[:, i]).double().mean()) for i, v in enumerate(networks["readers"](at_end))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of peeps_data.py; gets text_encoder/")
    parser.add_argument("--minutes", type=float, default=1.5, help="CPU time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.data / "tokenizer")
    sets = []
    for split, seed in (("training", 1), ("held_out", 2)):
        texts, named = random_captions(load(arguments.data, split)[1], CAPTIONS, seed)
        sets.append((tokenize(tokenizer, texts), torch.from_numpy(named)))
    (tokens, named), (test_tokens, test_said) = sets
    networks = nn.ModuleDict({"text": CLIPTextModel(text_config(tokenizer)), "readers": Readers()})
    parameters = sum(p.numel() for p in networks["text"].parameters())
    print(f"{parameters:,} parameters, {len(tokens):,} captions", flush=True)

    def losses() -> dict[str, Tensor]:
        chosen = torch.randint(len(tokens), (BATCH,))
        return {"nll": reading_loss(networks, tokens[chosen], named[chosen], tokenizer.eos_token_id)}

    rates = {"text": RATE, "readers": RATE}
    train(networks, losses, minutes=arguments.minutes, rates=rates, checkpoint=arguments.data / "text.pt", average=0.99)
    accuracy = reading_accuracy(networks, test_tokens[:2000], test_said[:2000], tokenizer.eos_token_id)
    print("accuracy on held-out captions", dict(zip(ATTRIBUTES, np.round(accuracy, 4).tolist(), strict=True)))
    networks["text"].save_pretrained(arguments.data / "text_encoder")


if __name__ == "__main__":
    main()
