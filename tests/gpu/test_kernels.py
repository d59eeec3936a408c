"""Kernels against float64 on the device, and the noise of the device against the CPU's."""

import pytest
import torch

from hrf_kernels import StepCoefficients, clipped_surrogate, philox_normal
from tests.kernels.cases import (
    FEW_DTYPES,
    ONE,
    OPTIONS,
    TWO,
    Case,
    Inputs,
    assert_within_tolerance,
    differentiate,
    draw,
    exact,
)

# as tests/kernels/test_noise.py has it: logarithm and sine to an ulp of a number below 5.8
NOISE_TOLERANCE = 2e-6


@pytest.fixture(params=["triton", "eager"])
def backend(request, device):
    if request.param == "triton" and device.type != "cuda":
        pytest.skip("Triton's own compiler and the GPU; the compiled PTX runs in tests/kernels")
    return request.param


def on(device, inputs):
    def move(value):
        return value.to(device) if isinstance(value, torch.Tensor | StepCoefficients) else value

    return Inputs(*({name: move(value) for name, value in part.items()} for part in inputs))


@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("output, latents", FEW_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [ONE, TWO], ids=["one program", "two stages"])
def test_loss_statistics_and_gradients_agree_with_float64(device, backend, shape, output, latents, option):
    inputs = on(device, draw(Case(shape, output=output, latents=latents, **OPTIONS[option]), seed=2))
    assert_within_tolerance(differentiate(clipped_surrogate, inputs, backend=backend), exact(inputs))


def test_images_of_256_pixels_agree_with_float64(device, backend):
    inputs = on(device, draw(Case((2, 3, 256, 256), clamp=0.75), seed=3))
    assert_within_tolerance(differentiate(clipped_surrogate, inputs, backend=backend), exact(inputs))


def test_the_noise_is_the_cpu_s(device):
    ids = torch.tensor([0, 5, 2**31])
    noise = philox_normal((3, 9, 11), seed=2**63 + 5, sample_id=ids.to(device), step=7).cpu()
    expected = philox_normal((3, 9, 11), seed=2**63 + 5, sample_id=ids, step=7)
    torch.testing.assert_close(noise, expected, atol=NOISE_TOLERANCE, rtol=0)
