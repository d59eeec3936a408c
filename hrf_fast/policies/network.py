"""Network: a UNet under its precision, and the count of what was asked of it."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import partial

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from hrf_fast.distributed import comm
from hrf_fast.policies.compilation import canonical

# the reentrant form loses gradients under ZeRO-3
NOT_REENTRANT = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


@dataclass
class UNetCalls:
    """What the run has asked of the UNet: batches, and images per forward and backward (a backward costs two)."""

    batches: int = 0
    forwards: int = 0
    backwards: int = 0

    @property
    def evaluations(self) -> int:
        """Cost in UNet forwards of one image."""
        return self.forwards + 2 * self.backwards

    def of_all_ranks(self, before: UNetCalls) -> UNetCalls:
        """The calls `before`, and those that the ranks have made since."""
        counts = [astuple(calls) for calls in comm.gather(self)]
        return UNetCalls(
            *(b + sum(count - b for count in each) for b, *each in zip(astuple(before), *counts, strict=True))
        )


class Network(nn.Module):
    """The UNet under its precision, fp32 in and its own dtype out; precision is autocast over fp32 weights."""

    def __init__(self, unet: nn.Module, precision: str, *, channels_last: bool = False) -> None:
        super().__init__()
        self.channels_last, self.compiled = channels_last, False
        self.unet, self.dtype = unet, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def forward(self, latents: Tensor, timesteps: int | Tensor) -> Tensor:
        if self.compiled:
            latents, timesteps = canonical(latents, timesteps)
        if self.channels_last:
            latents = latents.contiguous(memory_format=torch.channels_last)
        with torch.autocast(latents.device.type, self.dtype, enabled=self.dtype is not None):
            return self.unet(latents, timesteps, return_dict=False)[0].contiguous()
