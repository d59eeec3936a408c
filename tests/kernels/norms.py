"""Group norms on inputs of any order, and the exact ones."""

import torch
from torch.nn import functional

from hrf_kernels.norm import group_norm

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# (shape, groups): whole blocks, a group of ten channels as Stable Diffusion has it, several chunks, a row of tokens
SHAPES = {
    "whole blocks": ((2, 128, 8, 8), 32),
    "ragged": ((2, 24, 5, 7), 3),
    "320 channels": ((1, 320, 5, 4), 32),
    "several chunks": ((2, 16, 70, 66), 4),
    "tokens": ((3, 32, 33), 8),
    "one group": ((1, 512, 6, 5), 1),
}


def draw(shape, dtype, *, device="cpu", seed=0, mean=3.0):
    """Inputs, weight, bias and an upstream gradient; the memory of the inputs is channels-last."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(size, generator=generator) for size in (shape, shape[1:2], shape[1:2], shape)]
    inputs = (2 * numbers[0] + mean).movedim(1, -1).contiguous().movedim(-1, 1)
    return [inputs.to(device, dtype), *(n.to(device) for n in numbers[1:3]), numbers[3].to(device, dtype)]


def differentiate(function, inputs, weight, bias, upstream):
    """The output, and the gradients of inputs, weight and bias."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (inputs, weight, bias)]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


def ours(groups, silu, **options):
    return lambda inputs, weight, bias: group_norm(inputs, weight, bias, groups, 1e-6, silu=silu, **options)


def exact(groups, silu, inputs, weight, bias, upstream):
    """torch's group norm and SiLU in float64, of contiguous memory."""

    def function(inputs, weight, bias):
        output = functional.group_norm(inputs, groups, weight, bias, 1e-6)
        return functional.silu(output) if silu else output

    return differentiate(function, *(tensor.double().contiguous() for tensor in (inputs, weight, bias, upstream)))


def distances(found, expected):
    """||found − expected|| / ||expected|| of each."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


# roundings of a result; sums of parameters' gradients are fp32 of rounded inputs
TOLERANCES = {FP32: (5e-7, 5e-7, 2e-6, 2e-6), BF16: (4e-3, 4e-3, 2e-6, 2e-6), FP16: (6e-4, 6e-4, 2e-6, 2e-6)}


def assert_close(found, expected, dtype):
    assert all(distance <= limit for distance, limit in zip(distances(found, expected), TOLERANCES[dtype], strict=True))
