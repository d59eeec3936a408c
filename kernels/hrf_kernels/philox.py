"""Philox-4x32-10 noise in plain torch (Salmon et al., SC 2011): counter-based, so it needs no generator state.

The counter is (element // 4, step, sample_id, 0) and the key is the seed: a sample's noise depends on nothing but
(seed, sample_id, step), not on the batch it sits in or what was drawn before, nor, but for the rounding of logarithm
and cosine, on the device.
"""

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on four int64 tensors of one shape that hold 32-bit words; `key` is an unsigned 64-bit number."""
    c0, c1, c2, c3 = counter
    # both halves of a round as one tensor, since on a CPU the number of operations is what costs; the constants are
    # made of Python numbers on the device, which then waits for none of them
    half = torch.arange(2, device=c0.device).view(2, *[1] * c0.dim())
    factors, weyl, keys = (
        low + half * (high - low) for low, high in (_MULTIPLIERS, _WEYL, (key & _MASK, (key >> 32) & _MASK))
    )
    multiplied, added = torch.stack((c0, c2)), torch.stack((c1, c3))
    for _ in range(10):
        # modulo 2^64, which leaves both words of 32 bits as they are
        product = multiplied * factors
        multiplied = ((product >> 32) & _MASK).flip(0) ^ added ^ keys
        added = (product & _MASK).flip(0)
        keys = (keys + weyl) & _MASK
    return multiplied[0], added[0], multiplied[1], added[1]


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
