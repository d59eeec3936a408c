"""Normalisation: group norms of a network in half precision, computed in fp32 and remembered in half."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class HalfGroupNorm(nn.GroupNorm):
    """A group norm that computes in fp32 and hands on `dtype`; its backward has the input as it came, or in fp32.

    Under autocast alone CUDA hands on fp32 and keeps fp32, which doubles the activations of a window, and a CPU
    computes in bf16, whose backward in channels_last takes over four times as long as that in fp32.
    """

    dtype: torch.dtype
    lean: bool

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise [B, C, …]; of the same shape, in `dtype`."""
        options = self.num_groups, self.eps, self.dtype, self.lean
        output: Tensor = _GroupNorm.apply(inputs, self.weight, self.bias, *options)
        return output


def keep_halves(network: nn.Module, dtype: torch.dtype, *, lean: bool) -> None:
    """Make every group norm of a network a `HalfGroupNorm`; names, weights and modules stay the same.

    Args:
        lean: keep inputs as they come and cast them once more in the backward, which a CPU takes 6 % of a call for.
    """
    for module in network.modules():
        if type(module) is nn.GroupNorm and module.affine:
            module.__class__ = HalfGroupNorm
            # to a type checker a module's attributes are tensors and modules
            vars(module).update(dtype=dtype, lean=lean)


class _GroupNorm(torch.autograd.Function):
    """torch's group norm of an input that is cast to fp32, once more for the backward."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, dtype: torch.dtype, lean: bool
    ) -> Tensor:
        values, ctx.groups, ctx.dtype = _in_fp32(inputs), groups, inputs.dtype
        # a user's network may store its weights in half precision
        scale, shift = weight.float(), bias.float()
        output, mean, rstd = torch.native_group_norm(values, scale, shift, *_sizes(values), groups, eps)
        ctx.save_for_backward(inputs if lean else values, weight, mean, rstd)
        # before the result is in memory a second time
        del values
        return output.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, rstd = ctx.saved_tensors
        values, mask, dtypes = _in_fp32(inputs), list(ctx.needs_input_grad[:3]), (ctx.dtype, weight.dtype, weight.dtype)
        gradient = gradients[0].contiguous(memory_format=_order(values)).float()
        results = torch.ops.aten.native_group_norm_backward(
            gradient, values, mean, rstd, weight.float(), *_sizes(values), ctx.groups, mask
        )
        del values, gradient
        triples = zip(results, dtypes, mask, strict=True)
        return (*(result.to(dtype) if needed else None for result, dtype, needed in triples), None, None, None, None)


def _order(values: Tensor) -> torch.memory_format:
    """The order that torch's group norm takes: channels_last too on a CPU, contiguous on a GPU."""
    last = values.device.type == "cpu" and values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not values.is_contiguous() else torch.contiguous_format


def _in_fp32(inputs: Tensor) -> Tensor:
    # in this order: half as much is moved as if it were cast before
    return inputs.contiguous(memory_format=_order(inputs)).float()


def _sizes(values: Tensor) -> tuple[int, int, int]:
    return values.shape[0], values.shape[1], math.prod(values.shape[2:])
