"""Device functions that the kernels share, and the conversions of the machine that they run on here."""

import math

import pytest
import torch
import triton
import triton.language as tl

from hrf_kernels import formulas
from tests.kernels.cases import BF16, FP16, FP32, ulp, worst

BLOCK = 1024


@triton.jit
def convert_kernel(x, out, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(x + place).to(tl.float32).to(out.dtype.element_ty))


@triton.jit
def log_kernel(x, out, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out + place, formulas.natural_log(tl.load(x + place)))


@triton.jit
def sin_cos_kernel(u, sine, cosine, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    s, c = formulas.sin_cos_turns(tl.load(u + place))
    tl.store(sine + place, s)
    tl.store(cosine + place, c)


@triton.jit
def clamp_kernel(x, out, low, high, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out + place, formulas.clamp(tl.load(x + place), low, high))


def run(kernel, x, *more, outputs=1, dtype=FP32):
    """Outputs of an elementwise kernel for any number of elements."""
    x = torch.cat([x, x.new_ones(-len(x) % BLOCK)])
    results = [torch.full_like(x, math.nan, dtype=dtype) for _ in range(outputs)]
    for first in range(0, len(x), BLOCK):
        part = slice(first, first + BLOCK)
        kernel[(1,)](x[part], *(result[part] for result in results), *more, BLOCK=BLOCK, enable_fp_fusion=False)
    return results


def floats(*bits):
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(FP32)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_stores_round_to_nearest_even(dtype):
    # 1 + 2^-8 lies between bfloat16's 1 and 1 + 2^-7, at the same distance: to the even one, as 1 + 3·2^-8 goes up
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, -1 - 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20])
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 65504.0, 65519.0, 65520.0])
    # what rounds up to the next power of two, and numbers below the smallest normal
    carries = floats(0x3FFFFFFF, 0x40FF8000, 0x7F7FFFFF, 0x00012345, 0x807FFFFF, 0x33000001)
    scale = torch.logspace(-12, 4, 1000)
    random = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * scale
    x = torch.cat([ties, special, carries, random])
    (found,) = run(convert_kernel, x, dtype=dtype)
    expected = x.to(dtype)
    number = ~expected.isnan()
    # bits, so that the signs of zeros count too
    assert torch.equal(found[: len(x)][number].view(torch.int16), expected[number].view(torch.int16))
    assert found[: len(x)][~number].isnan().all()
    if dtype == BF16:
        assert found[:5].tolist() == [1, 1 + 2.0**-6, -1, -1 - 2.0**-6, 1 + 2.0**-7]


def test_loads_of_bfloat16_are_exact():
    bits = torch.arange(-(2**15), 2**15, 7, dtype=torch.int32).to(torch.int16)
    x = bits.view(BF16)
    (found,) = run(convert_kernel, x)
    expected = x.float()
    number = ~expected.isnan()
    assert torch.equal(found[: len(x)][number].view(torch.int32), expected[number].view(torch.int32))
    assert found[: len(x)][~number].isnan().all()


def test_the_logarithm_to_an_ulp():
    near_one = 1 + torch.linspace(-0.5, 1, 2000)
    x = torch.cat([near_one, torch.logspace(-37, 38, 3000), torch.tensor([1.0, 2.0**-126, 3.4e38])])
    (found,) = run(log_kernel, x)
    exact = x.double().log()
    assert worst((found[: len(x)].double() - exact) / ulp(exact, FP32)) <= 1
    assert found[len(x) - 3] == 0


def test_sine_and_cosine_of_a_turn():
    # every eighth, its neighbours, and the largest number below 1
    eighths = torch.arange(8) / 8
    u = torch.cat([eighths, (eighths - 2.0**-24).clamp(min=0), eighths + 2.0**-24, torch.rand(2000)])
    u = (u * 2**24).floor() / 2**24
    sine, cosine = run(sin_cos_kernel, u, outputs=2)
    angle = 2 * math.pi * u.double()
    assert worst(sine[: len(u)] - angle.sin()) <= 1.2e-7
    assert worst(cosine[: len(u)] - angle.cos()) <= 1.2e-7
    assert sine[0] == 0 and cosine[0] == 1


def test_the_clamp_keeps_a_nan():
    x = torch.tensor([-2.0, -0.75, 0.0, 0.75, 2.0, math.inf, -math.inf, math.nan])
    (found,) = run(clamp_kernel, x, -0.75, 0.75)
    assert found[:7].tolist() == [-0.75, -0.75, 0, 0.75, 0.75, 0.75, -0.75] and found[7].isnan()
