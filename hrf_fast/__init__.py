"""Hierarchical reward fine-tuning of diffusion models (arXiv 2410.08315): the Python API.

    config = hrf_fast.load_config(["model.name=fashion", "run.folder=runs/mine"])
    result = hrf_fast.train(config, reward=lambda images, prompts: images.mean((1, 2, 3)))

A name is imported when it is first used, so that `import hrf_fast` costs nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from hrf_fast.version import __version__

if TYPE_CHECKING:
    from hrf_fast.config.load import load_config
    from hrf_fast.config.options import Config
    from hrf_fast.rewards.registry import register_reward
    from hrf_fast.run.listeners import Listener
    from hrf_fast.run.result import RunResult
    from hrf_fast.train import train
    from hrf_fast.training.advantages import register_advantages
    from hrf_fast.windows.base import Window
    from hrf_fast.windows.schedules import register_schedule

# CUDA's matrix products are deterministic under it; torch reads it once, at the first of a process
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_HOMES = {
    "Config": "hrf_fast.config.options",
    "Listener": "hrf_fast.run.listeners",
    "RunResult": "hrf_fast.run.result",
    "Window": "hrf_fast.windows.base",
    "load_config": "hrf_fast.config.load",
    "register_advantages": "hrf_fast.training.advantages",
    "register_reward": "hrf_fast.rewards.registry",
    "register_schedule": "hrf_fast.windows.schedules",
    "train": "hrf_fast.train",
}
__all__ = [
    "Config",
    "Listener",
    "RunResult",
    "Window",
    "__version__",
    "load_config",
    "register_advantages",
    "register_reward",
    "register_schedule",
    "train",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hrf_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    # the import has put the submodule `train` under this name
    globals()[name] = value
    return value
