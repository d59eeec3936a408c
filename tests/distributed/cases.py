"""What the ranks of the tests run."""

from collections.abc import Sequence


def bright(images, prompts=None):
    """A smooth reward: rounding must not be magnified as a JPEG size would."""
    return images.mean((1, 2, 3))


def run(words: Sequence[str]) -> int:
    """A whole run by its command line; returns the exit code."""
    from hrf_fast.train import main

    return main(words)
