"""Normalisation: group norms that keep half precision, and on a GPU the order of memory that convolutions prefer."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
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
        options = self.num_groups, self.eps, self.dtype, self.lean, False
        output: Tensor = _GroupNorm.apply(inputs, self.weight, self.bias, *options)
        return output


class ChannelsLastGroupNorm(nn.GroupNorm):
    """A group norm of channels-last memory, and the SiLU behind it where `silu`; only its input is remembered.

    The Triton kernels leave the memory's order, which torch's norm on CUDA turns around and back. A compiler fuses
    torch's norm with what is around it, and chooses the order by itself.
    """

    dtype: torch.dtype | None
    silu: bool
    kernels: str

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise [B, C, …]; of the same shape, in `dtype`, or in that of the inputs."""
        dtype = self.dtype or inputs.dtype
        if torch.compiler.is_compiling():
            output = nn.functional.group_norm(
                inputs.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps
            )
            return (nn.functional.silu(output) if self.silu else output).to(dtype)
        if self.kernels == "triton":
            from hrf_kernels.norm import group_norm

            return group_norm(inputs, self.weight, self.bias, self.num_groups, self.eps, silu=self.silu, dtype=dtype)
        options = self.num_groups, self.eps, dtype, True, self.silu
        result: Tensor = _GroupNorm.apply(inputs, self.weight, self.bias, *options)
        return result


class _TimesOnly(nn.SiLU):
    """The activation of a block whose norms have it: images come through activated, time embeddings [B, C] do not."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs if inputs.dim() > 2 else super().forward(inputs)


def keep_halves(network: nn.Module, dtype: torch.dtype, *, lean: bool) -> None:
    """Make every group norm of a network a `HalfGroupNorm`; names, weights and modules stay the same.

    Args:
        lean: keep inputs as they come and cast them once more in the backward, which a CPU takes 6 % of a call for.
    """
    for module in _plain_norms(network):
        module.__class__ = HalfGroupNorm
        # to a type checker a module's attributes are tensors and modules
        vars(module).update(dtype=dtype, lean=lean)


def keep_channels_last(network: nn.Module, dtype: torch.dtype | None, kernels: str) -> None:
    """Make every group norm a `ChannelsLastGroupNorm`, with the SiLU that follows it in diffusers' blocks.

    Args:
        dtype: that norms hand on; None for that of their inputs. kernels: triton or eager.
    """
    norms = _plain_norms(network)
    for norm in norms:
        norm.__class__ = ChannelsLastGroupNorm
        vars(norm).update(dtype=dtype, silu=False, kernels=kernels)
    for module in network.modules():
        # with a scale and a shift by time the second norm's activation is behind those
        if type(module) is ResnetBlock2D and module.time_embedding_norm == "default":
            _activate(module, [module.norm1, module.norm2], "nonlinearity")
        if type(module) is Transformer2DModel and module.use_linear_projection:
            # which makes its tokens contiguous as an image, and so all that comes after it
            module.register_forward_hook(_restore_order)
    if isinstance(getattr(network, "conv_norm_out", None), nn.GroupNorm):
        _activate(network, [network.conv_norm_out], "conv_act")


def _restore_order(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """A block's one output, [B, C, H, W], in channels-last memory."""
    if isinstance(outputs, tuple):
        return tuple(output.contiguous(memory_format=torch.channels_last) for output in outputs)
    outputs.sample = outputs.sample.contiguous(memory_format=torch.channels_last)
    return outputs


def _activate(block: nn.Module, norms: list[Any], activation: str) -> None:
    """Let norms have the activation behind them, if it is SiLU."""
    if type(getattr(block, activation)) is nn.SiLU and all(type(norm) is ChannelsLastGroupNorm for norm in norms):
        for norm in norms:
            vars(norm).update(silu=True)
        setattr(block, activation, _TimesOnly())


def _plain_norms(network: nn.Module) -> list[nn.GroupNorm]:
    return [module for module in network.modules() if type(module) is nn.GroupNorm and module.affine]


class _GroupNorm(torch.autograd.Function):
    """torch's group norm of an input that is cast to fp32, and SiLU of it; both once more for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        dtype: torch.dtype,
        lean: bool,
        silu: bool,
    ) -> Tensor:
        values, ctx.groups, ctx.dtype, ctx.silu, ctx.eps = _in_fp32(inputs), groups, inputs.dtype, silu, eps
        # a user's network may store its weights in half precision
        scale, shift = weight.float(), bias.float()
        output, mean, rstd = torch.native_group_norm(values, scale, shift, *_sizes(values), groups, eps)
        ctx.save_for_backward(inputs if lean else values, weight, bias, mean, rstd)
        # before the result is in memory a second time
        del values
        return (nn.functional.silu(output) if silu else output).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias, mean, rstd = ctx.saved_tensors
        values, mask, dtypes = _in_fp32(inputs), list(ctx.needs_input_grad[:3]), (ctx.dtype, weight.dtype, weight.dtype)
        gradient = gradients[0].contiguous(memory_format=_order(values)).float()
        scale, sizes = weight.float(), _sizes(values)
        if ctx.silu:
            output, _, _ = torch.native_group_norm(values, scale, bias.float(), *sizes, ctx.groups, ctx.eps)
            gradient = torch.ops.aten.silu_backward(gradient, output)
        results = torch.ops.aten.native_group_norm_backward(
            gradient, values, mean, rstd, scale, *sizes, ctx.groups, mask
        )
        del values, gradient
        triples = zip(results, dtypes, mask, strict=True)
        return (*(result.to(dtype) if needed else None for result, dtype, needed in triples), *[None] * 5)


def _order(values: Tensor) -> torch.memory_format:
    """The order that torch's group norm takes: channels_last too on a CPU, contiguous on a GPU."""
    last = values.device.type == "cpu" and values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)
    # a batch of one may have any first stride, at which torch looks all the same
    last = last and values.stride(0) == values[:1].numel() and not values.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _in_fp32(inputs: Tensor) -> Tensor:
    # in this order: half as much is moved as if it were cast before
    return inputs.contiguous(memory_format=_order(inputs)).float()


def _sizes(values: Tensor) -> tuple[int, int, int]:
    return values.shape[0], values.shape[1], math.prod(values.shape[2:])
