"""Which backend runs, and what is said where Triton cannot."""

import re
import subprocess
import sys

import pytest
import triton

import hrf_kernels
from hrf_kernels import choose_backend, launch
from tests.kernels.test_bad_input import arguments, every_function, refuse


@every_function
def test_an_unknown_backend(function):
    message = "backend is 'cuda'; use one of auto, eager, triton"
    refuse(function, arguments(function), ValueError, message, "cuda")


@every_function
def test_triton_on_a_cpu_without_an_interpreter(function, monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    text = refuse(function, arguments(function), ValueError, 'backend="triton" was asked for tensors on cpu', "triton")
    assert all(hint in text for hint in ('backend="auto"', '"eager"', "GPU", "TRITON_INTERPRET=1"))


@every_function
def test_triton_where_it_is_not_installed(function, monkeypatch):
    monkeypatch.setattr(hrf_kernels, "_TRITON_INSTALLED", False)
    message = 'backend="triton" needs the triton package: pip install triton, or use backend="auto"'
    refuse(function, arguments(function), ValueError, re.escape(message), "triton")
    assert choose_backend("auto", "cuda") == ("eager", "triton is not installed")


def test_the_choice_of_auto_and_its_reason(monkeypatch):
    monkeypatch.setattr(hrf_kernels, "_TRITON_INSTALLED", True)
    assert choose_backend("auto", "cpu") == ("eager", "tensors are on cpu")
    assert choose_backend("auto", "cuda:1") == ("triton", "a GPU and Triton")
    assert choose_backend("eager", "cuda") == ("eager", "asked for")
    assert choose_backend("triton", "cpu") == ("triton", "asked for")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from hrf_kernels import StepCoefficients, choose_backend, clipped_surrogate, gaussian_step
coef = StepCoefficients(*torch.tensor([1.0, -0.5, 0.9, 0.0, 0.3, 0.1]), x0_clip=1.0)
output, latents = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
following, old = gaussian_step(output, latents, coef, seed=0, sample_id=torch.arange(2), step=0)
result = clipped_surrogate(output, latents, following, coef, old, torch.ones(2), 0.1)
result.loss.sum().backward()
assert output.grad.any() and result.ratio.tolist() == [1, 1]
assert choose_backend("auto", "cuda") == ("eager", "triton is not installed")
"""


def test_everything_but_the_kernels_works_without_triton():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_samples_of_more_chunks_than_the_grid_takes():
    # 65,535 programs along CUDA's axis y, of 8192 elements each
    most = 65_535 * 8192
    assert launch.block_plan(most).chunks == 65_535
    with pytest.raises(ValueError, match=f"a sample has {most + 1} elements; the Triton kernels take at most {most}"):
        launch.block_plan(most + 1)
    with pytest.raises(ValueError, match=r"a sample has 8193 elements; one program takes at most 8192"):
        launch.block_plan(8193, one_program=True)
