"""Where the kernels run: in the Triton interpreter if TRITON_INTERPRET=1, else as sm_90 (or sm_80) PTX, on the CPU.

    python -m pytest tests/kernels
    TRITON_INTERPRET=1 python -m pytest tests/kernels

Left out: a GPU. `machine` is None in the interpreter, else the PTX machine with its list of launches.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# of the GPUs that the PTX machine stands for; the interpreter knows none
CAPABILITIES = (90,) if INTERPRETED else (90, 80)

# triton comes with the GPU extra only
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture
def capability():
    """Of the GPU that is compiled for; tests override it by a parameter."""
    return 90


@pytest.fixture(autouse=True)
def machine(capability):
    if INTERPRETED:
        yield None
    else:
        from tests.ptx.driver import ptx_machine

        with ptx_machine(capability) as machine:
            yield machine


@pytest.fixture(scope="session", autouse=True)
def interpreter_rounds_to_nearest():
    """Triton's interpreter truncates float32 to bfloat16, where a GPU rounds to nearest, ties to even.

    It also shifts the subnormal numbers of bfloat16 wrongly. test_formulas.py holds it to both.
    """
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.array(values)).to(torch.bfloat16).view(torch.uint16).numpy()
        return original(values, source, target, rounding_mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield


class _NanFilled:
    """torch whose fresh memory is NaN (True for bool, by a byte that no kernel writes)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._fill(torch.empty(*args, **kwargs))

    def empty_like(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._fill(torch.empty_like(*args, **kwargs))

    def empty_strided(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._fill(torch.empty_strided(*args, **kwargs))

    def _fill(self, fresh: torch.Tensor) -> torch.Tensor:
        if fresh.dtype == torch.bool:
            fresh.view(torch.uint8).fill_(255)
            return fresh
        return fresh.fill_(math.nan)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    """An element that a backend forgot to write fails its test."""
    from hrf_kernels import eager, fused, norm

    for module in (eager, fused, norm):
        monkeypatch.setattr(module, "torch", _NanFilled())
