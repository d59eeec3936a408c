"""Keys for counter-based noise: every random number of a run is a function of (seed, iteration, purpose).

So there is no generator state: a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PURPOSES = ("anchors", "rollout", "search", "windows", "reward", "panel", "self_check", "prompts", "adapters", "steps")


def noise_key(seed: int, iteration: int, purpose: str) -> int:
    """An unsigned 64-bit key, independent for each combination.

    Raises:
        ValueError: a seed of more than 32 bits, which would share keys with a smaller one.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"the seed is {seed}; run.seed and evaluation.seed must be from 0 to 2^32 - 1")
    sequence = np.random.SeedSequence([seed, iteration, PURPOSES.index(purpose)])
    return int(sequence.generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class NoiseKey:
    """Names the noise of a batch: a key, and a counter for each sample."""

    key: int
    """Unsigned 64-bit, of `noise_key`."""
    sample_id: Tensor
    """[B] int64, on the device that the noise is wanted on."""

    def __len__(self) -> int:
        return len(self.sample_id)

    def __getitem__(self, rows: slice) -> NoiseKey:
        return NoiseKey(self.key, self.sample_id[rows])

    @staticmethod
    def join(parts: Sequence[NoiseKey]) -> NoiseKey:
        """One batch of several, which must have one key."""
        if len({part.key for part in parts}) != 1:
            raise ValueError("samples of different keys do not share a batch: their noise is drawn under one key")
        return parts[0] if len(parts) == 1 else NoiseKey(parts[0].key, torch.cat([part.sample_id for part in parts]))

    def split(self, size: int) -> Iterator[NoiseKey]:
        return (NoiseKey(self.key, ids) for ids in self.sample_id.split(size))


def noise_generator(seed: int, iteration: int, purpose: str) -> torch.Generator:
    """A CPU generator on that key, for choices that are not per-sample noise."""
    return torch.Generator().manual_seed(noise_key(seed, iteration, purpose) >> 1)


@contextmanager
def seeded_globals(seed: int, iteration: int, purpose: str) -> Iterator[None]:
    """Run a block that draws from the global generators under a key of its own; afterwards they are as before."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        seed_everything(seed, iteration, purpose)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def seed_everything(seed: int, iteration: int, purpose: str = "reward") -> None:
    """Seed the global generators too, so that a user's reward that draws from them is repeatable."""
    value = noise_key(seed, iteration, purpose) % 2**32
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
