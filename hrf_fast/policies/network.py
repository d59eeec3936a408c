"""Network: a denoiser, UNet or transformer, under its precision, and the count of its calls."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from hrf_fast.config.run_options import PRECISIONS
from hrf_fast.distributed import comm
from hrf_fast.policies.calling import Forward, call_unet
from hrf_fast.policies.compilation import canonical
from hrf_fast.policies.normalisation import keep_channels_last, keep_halves
from hrf_kernels import choose_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# the reentrant form loses gradients under ZeRO-3
NOT_REENTRANT = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


@dataclass
class NetworkCalls:
    """Counts of a run's network calls: calls, and images per forward and backward (a backward costs two)."""

    batches: int = 0
    forwards: int = 0
    backwards: int = 0

    @property
    def evaluations(self) -> int:
        """Cost in forwards of one image."""
        return self.forwards + 2 * self.backwards

    def of_all_ranks(self, before: NetworkCalls) -> NetworkCalls:
        """The calls `before`, and those that the ranks have made since."""
        counts = [astuple(calls) for calls in comm.gather(self)]
        return NetworkCalls(
            *(b + sum(count - b for count in each) for b, *each in zip(astuple(before), *counts, strict=True))
        )


class Network(nn.Module):
    """A denoiser under its precision, fp32 in and its own dtype out; precision is autocast over fp32 weights.

    It is `unet` whatever its architecture: checkpoints have that name before those of the weights.
    """

    base_digest = ""
    """The digest of the pretrained weights; empty for others."""

    def __init__(
        self,
        unet: nn.Module,
        precision: str,
        *,
        channels_last: bool = False,
        call: Forward = call_unet,
        device: str | None = None,
        kernels: str | None = None,
    ) -> None:
        """Wrap a denoiser that `call` knows the arguments of.

        Args:
            device: cuda or cpu; where the weights are by default. A plan's stand in for weights on CUDA.
            kernels: triton or eager, of the group norms where channels come last on CUDA; None for what can run.

        Raises:
            ValueError: an unknown precision.
        """
        super().__init__()
        self.call = call
        if precision not in PRECISIONS:
            raise ValueError(f"compute.precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
        self.channels_last, self.compiled = channels_last, False
        self.unet, self.dtype = unet, None if precision == "fp32" else DTYPES[precision]
        for parameter in unet.parameters() if channels_last else ():
            # not unet.to(…), which can't exchange the fake ones of a plan
            if parameter.dim() == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
        weights = next(unet.parameters()).device
        device = device or weights.type
        if channels_last and device == "cuda":
            keep_channels_last(unet, self.dtype, kernels or choose_backend("auto", weights)[0])
        elif self.dtype is not None:
            keep_halves(unet, self.dtype, lean=device != "cpu")

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Keep only the inputs of the denoiser's blocks and run each block again in the backward; or stop doing so.

        Raises:
            ValueError: the denoiser has no such mode.
        """
        unet: Any = self.unet
        if not hasattr(unet, "enable_gradient_checkpointing"):
            raise ValueError(
                f"{type(unet).__name__} has no enable_gradient_checkpointing, as diffusers' networks have, which "
                "compute.activations=checkpoint calls, and auto where memory is short; use keep or replay with smaller "
                "compute.images_per_call"
            )
        if enabled:
            unet.enable_gradient_checkpointing(NOT_REENTRANT)
        else:
            unet.disable_gradient_checkpointing()

    def forward(self, latents: Tensor, timesteps: float | Tensor, **condition: Tensor) -> Tensor:
        """The denoiser's output for latents [B, …], of their shape; `timesteps` is one value or [B]."""
        if self.compiled:
            latents, timesteps = canonical(latents, timesteps)
        if self.channels_last:
            latents = latents.contiguous(memory_format=torch.channels_last)
        # each weight is used once a call: a cache of rounded weights would only hold half of them more until its end
        enabled = self.dtype is not None
        with torch.autocast(latents.device.type, self.dtype, enabled=enabled, cache_enabled=False):
            return self.call(self.unet, latents, timesteps, condition).contiguous()
