"""One run of an arm on a toy, by the trainer's own loop, as one line of numbers."""

from __future__ import annotations

import io
import tempfile
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.toys.arms import ARMS, COMMON, STEPS
from benchmarks.toys.mixtures import Toy, points_of
from benchmarks.toys.policy import Mlp, PointFeatures, policy_of
from hrf_fast.assembly.components import build_components
from hrf_fast.config.load import load_config
from hrf_fast.config.options import Config
from hrf_fast.distributed import comm
from hrf_fast.evaluation.panel import Panel
from hrf_fast.run.listeners import Listener
from hrf_fast.train import train_components
from hrf_fast.training.components import Components

PANEL_SHARE = 0.2
"""A panel is due after this share of the budget."""


_CENSUS = Panel(size=512, seed=0, images_per_call=512)


class Census(Listener):
    """Counts the modes that a run's samples reach, at its start and each time that a share of its budget is spent."""

    def __init__(self, toy: Toy, components: Components, budget: int) -> None:
        self.panels: list[dict[str, Any]] = []
        self._toy, self._components, self._budget = toy, components, budget

    def iteration(self, record: dict[str, Any]) -> str | None:
        if record["evaluations"] >= len(self.panels) * PANEL_SHARE * self._budget:
            self._count(record["evaluations"])
        return None

    def panel(self, record: dict[str, Any], images: Tensor) -> str | None:
        if not self.panels:
            self._count(0)
        return None

    def _count(self, evaluations: int) -> None:
        policy = self._components.policy
        with policy.uncounted():
            images = _CENSUS.images(policy)
        shares = self._toy.shares(points_of(images)).tolist()
        self.panels.append(
            {
                "evaluations": evaluations,
                "reward": float(self._toy.reward(images).mean()),
                "shares": [round(share, 4) for share in shares],
            }
        )


def arm_config(arm: str) -> Config:
    """The configuration of an arm, less its seed, folder and learning rate."""
    return load_config([*COMMON, *ARMS[arm], "evaluation.every=0"])


def run(toy: Toy, mlp: Mlp, config: Config, *, seed: int, learning_rate: float) -> list[dict[str, Any]]:
    """Train the MLP's copy by an arm; returns the census of its panels, the pretrained model's first.

    A run that diverges ends with the panels that it came to.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            config,
            run=replace(config.run, seed=seed, folder=str(Path(folder) / "run")),
            optimizer=replace(config.optimizer, learning_rate=learning_rate),
        )
        with comm.job(config.run.lost_after):
            policy, network = policy_of(mlp, num_inference_steps=STEPS), PointFeatures()
            config, components = build_components(config, reward=toy.reward, policy=policy, network=network)
            census = Census(toy, components, config.stop.max_evaluations)
            with suppress(FloatingPointError), redirect_stderr(io.StringIO()):
                train_components(config, components, [census])
    return census.panels
