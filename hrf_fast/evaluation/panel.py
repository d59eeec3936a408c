"""The panel: a fixed set of noises whose images are evaluated before, during and after training.

The noise is counter-based, so two models see the very same panel, step by step; their grids can be laid side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hrf_fast.assets import SHIPPED
from hrf_fast.distributed import comm
from hrf_fast.evaluation.diversity import Interval, inception_interval, mean_interval, vendi_interval
from hrf_fast.noise import NoiseKey, noise_key, seed_everything
from hrf_fast.policies.base import Policy
from hrf_fast.policies.sample import sample
from hrf_fast.rewards import CombinedReward
from hrf_fast.vision.base import Classifier, FeatureNetwork
from hrf_fast.vision.load import load_feature_network


@dataclass(frozen=True)
class PanelMetrics:
    """One panel's metrics with 95 % bootstrap intervals; a metric without a network for it is None."""

    images: Tensor
    """[N, 3, H, W] in [0, 1] on the CPU."""
    rewards: list[float]
    """Per image."""
    reward: Interval
    vendi: Interval | None
    inception: Interval | None

    def record(self) -> dict[str, Any]:
        """JSON-able: every interval as [value, low, high], and the rewards of each image for paired comparison."""
        intervals = {"reward": self.reward, "vendi": self.vendi, "inception": self.inception}
        metrics = {name: list(interval) for name, interval in intervals.items() if interval is not None}
        largest = max(map(abs, self.rewards))
        # six decimals, and six digits of rewards in smaller units
        decimals = max(6, 5 - math.floor(math.log10(largest))) if largest else 6
        return {**metrics, "rewards": [round(value, decimals) for value in self.rewards]}


@dataclass(frozen=True)
class Panel:
    """Which noises are evaluated, and with what network."""

    size: int
    """Images; the first n of a larger panel are the smaller panel."""
    seed: int
    """Seed of the panel's noise, and of its bootstrap."""
    images_per_call: int
    network: FeatureNetwork | None = None
    """Features for the Vendi Score, and for the Inception Score where it is a classifier."""

    def evaluate(self, policy: Policy, reward: CombinedReward) -> PanelMetrics:
        """Sample the panel and compute its metrics, on all ranks together."""
        # a reward that draws random numbers draws the same for every panel
        seed_everything(self.seed, 0)
        images = policy.decode(self._sample(policy))
        return comm.main_says(lambda: self._measure(images, reward))

    def noise(self, policy: Policy) -> NoiseKey:
        """The noise of the panel's images."""
        return NoiseKey(noise_key(self.seed, 0, "panel"), torch.arange(self.size, device=policy.device))

    def _sample(self, policy: Policy) -> Tensor:
        """The panel's latents on every rank; each rank denoises its share."""
        noise = self.noise(policy)
        share = -(-len(noise) // comm.world_size())
        # ranks denoise equally many, the last ones again what others do
        ids = noise.sample_id[(torch.arange(share) + comm.rank() * share).clamp(max=len(noise) - 1)]
        part = sample(policy, NoiseKey(noise.seed, ids), images_per_call=self.images_per_call)
        return comm.gather_rows(part)[: len(noise)]

    def _measure(self, images: Tensor, reward: CombinedReward) -> PanelMetrics:
        rewards = reward(images).total.cpu()
        vendi = inception = None
        if self.network is not None:
            vendi = vendi_interval(self.network.features(images).cpu(), seed=self.seed)
        if isinstance(self.network, Classifier) and "label" in self.network.labels:
            inception = inception_interval(self.network.log_probs(images)["label"].cpu(), seed=self.seed)
        return PanelMetrics(
            images=images.cpu(),
            rewards=rewards.tolist(),
            reward=mean_interval(rewards, seed=self.seed),
            vendi=vendi,
            inception=inception,
        )


def choose_network(spec: str, model_name: str, device: torch.device) -> FeatureNetwork | None:
    """The feature network of evaluation.network; `auto` is the shipped model's own, and none for other models."""
    if spec == "auto":
        spec = model_name if model_name in SHIPPED else "none"
    if spec == "none":
        return None
    return load_feature_network("evaluation.network", spec, device)
