"""A reward that is right or wrong, as OCR and GenEval are: 1 where the shipped classifier sees a sneaker, else 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from hrf_fast.rewards.classifier import classifier
from hrf_fast.rewards.registry import Reward


def is_sneaker(images: Tensor, prompts: Sequence[str] | None) -> Tensor:
    """[B], 0 or 1, of images [B, 3, H, W] in [0, 1]."""
    return (_log_prob(images.device)(images, prompts) > math.log(0.5)).float()


@cache
def _log_prob(device: torch.device) -> Reward:
    return classifier("Sneaker", device=device)
