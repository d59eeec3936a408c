"""Components: the model and everything that acts on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from hrf_fast.config.options import Config
from hrf_fast.engines.base import Engine
from hrf_fast.evaluation.panel import PanelScores, evaluate
from hrf_fast.memory.activations import Activations
from hrf_fast.policies.pixel import Policy
from hrf_fast.rewards import CombinedReward
from hrf_fast.training.rewarding import Background
from hrf_fast.vision.base import FeatureNetwork
from hrf_fast.windows.base import WindowSchedule


@dataclass
class Parts:
    """The model and everything that acts on it."""

    policy: Policy
    reward: CombinedReward
    schedule: WindowSchedule
    engine: Engine
    scorer: FeatureNetwork | None
    config: Config
    activations: Activations = field(default_factory=lambda: Activations(0))
    background: Background = field(default_factory=lambda: Background(thread=False))

    def evaluate_panel(self) -> PanelScores:
        """Score the fixed panel with the current weights, or the averaged ones; its UNet calls are not training's."""
        evaluation = self.config.evaluation
        with self.policy.uncounted(), self.engine.gathered(ema=True):
            return evaluate(
                self.policy,
                self.reward,
                self.scorer,
                panel_size=evaluation.panel_size,
                seed=evaluation.seed,
                batch_size=self.config.sample.batch_size,
                resamples=evaluation.resamples,
            )
