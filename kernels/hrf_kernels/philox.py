"""Philox-4x32-10 noise in plain torch (Salmon et al., SC 2011): counter-based, so it needs no generator state.

The counter is (element // 4, step, sample_id, 0) and the key is the seed: a sample's noise depends on nothing but
(seed, sample_id, step), not on the batch it sits in, the device or what was drawn before.
"""

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _multiply(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product held in int64, without overflowing it."""
    upper, lower = a * (factor >> 16), a * (factor & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on four int64 tensors that hold 32-bit words; `key` is an unsigned 64-bit number."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def philox_normal(shape: tuple[int, ...], *, seed: int, sample_id: Tensor, step: int) -> Tensor:
    """Standard normal noise.

    Args:
        shape: of one sample, e.g. (C, H, W).
        seed: unsigned 64-bit key.
        sample_id: [B] int64 in [0, 2^32), on the device that the noise is wanted on.
        step: in [0, 2^32).

    Returns:
        [B, *shape] fp32; element i of a sample comes from word i % 4 of counter i // 4 by Box and Muller.
    """
    count = math.prod(shape)
    quads = torch.arange((count + 3) // 4, device=sample_id.device).expand(len(sample_id), -1)
    words = philox(
        (quads, torch.full_like(quads, step), sample_id[:, None].expand_as(quads), torch.zeros_like(quads)), seed
    )
    # 24 bits fill a float32: u is in (0, 1] for the logarithm and [0, 1) for the angle
    u0, u1, u2, u3 = ((word >> 8).float() * 2.0**-24 for word in words)
    radius0, radius1 = ((-2 * (1 - u).log()).sqrt() for u in (u0, u2))
    angle0, angle1 = u1 * (2 * math.pi), u3 * (2 * math.pi)
    quad = (radius0 * angle0.cos(), radius0 * angle0.sin(), radius1 * angle1.cos(), radius1 * angle1.sin())
    return torch.stack(quad, dim=-1).flatten(1)[:, :count].reshape(len(sample_id), *shape).contiguous()
