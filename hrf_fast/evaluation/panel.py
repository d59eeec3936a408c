"""The panel: a fixed set of noises whose images are scored before, during and after training.

The noise is counter-based, so two models see the very same panel, step by step; their grids can be laid side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hrf_fast.assets import SHIPPED
from hrf_fast.distributed import comm
from hrf_fast.evaluation.diversity import Interval, inception_interval, mean_interval, vendi_interval
from hrf_fast.noise import NoiseKey, noise_key, seed_everything
from hrf_fast.policies.pixel import Policy
from hrf_fast.policies.sample import sample
from hrf_fast.rewards import CombinedReward
from hrf_fast.vision.base import Classifier, FeatureNetwork
from hrf_fast.vision.load import load_feature_network

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class PanelScores:
    """One panel's scores with 95 % bootstrap intervals; what has no network for it is None."""

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
        scores = {name: list(interval) for name, interval in intervals.items() if interval is not None}
        return {**scores, "rewards": [round(value, 6) for value in self.rewards]}


def choose_network(spec: str, model_name: str, device: torch.device) -> FeatureNetwork | None:
    """The feature network of evaluation.scorer; `auto` is the shipped model's own, and none for other models."""
    if spec == "auto":
        spec = model_name if model_name in SHIPPED else "none"
    if spec == "none":
        return None
    return load_feature_network("evaluation.scorer", spec, device)


def panel_noise(policy: Policy, seed: int, count: int) -> NoiseKey:
    """The noise of the first `count` images of the panel `seed`."""
    return NoiseKey(noise_key(seed, 0, "panel"), torch.arange(count, device=policy.device))


def evaluate(
    policy: Policy,
    reward: CombinedReward,
    network: FeatureNetwork | None,
    *,
    panel_size: int,
    seed: int,
    batch_size: int,
    resamples: int = 1000,
) -> PanelScores:
    """Sample the panel and score it: reward, Vendi Score, and Inception Score where the network is a classifier.

    Args:
        panel_size: images; the first n of a larger panel are the smaller panel.
        seed: of the panel's noise.
    """
    # a reward that draws random numbers draws the same for every panel
    seed_everything(seed, 0)
    images = policy.images(_sample_panel(policy, panel_noise(policy, seed, panel_size), batch_size))
    return comm.main_says(lambda: _score_panel(images, reward, network, seed=seed, resamples=resamples))


def _score_panel(
    images: Tensor, reward: CombinedReward, network: FeatureNetwork | None, *, seed: int, resamples: int
) -> PanelScores:
    rewards = reward(images).total.cpu()
    vendi = inception = None
    if network is not None:
        vendi = vendi_interval(network.features(images).cpu(), resamples=resamples, seed=seed)
    if isinstance(network, Classifier) and "label" in network.labels:
        inception = inception_interval(network.log_probs(images)["label"].cpu(), resamples=resamples, seed=seed)
    return PanelScores(
        images=images.cpu(),
        rewards=rewards.tolist(),
        reward=mean_interval(rewards, resamples=resamples, seed=seed),
        vendi=vendi,
        inception=inception,
    )


def _sample_panel(policy: Policy, noise: NoiseKey, batch_size: int) -> Tensor:
    """The panel's latents on every rank; each rank denoises its share."""
    share = -(-len(noise) // comm.world_size())
    # ranks denoise equally many, the last ones again what others do
    ids = noise.sample_id[(torch.arange(share) + comm.rank() * share).clamp(max=len(noise) - 1)]
    return comm.gather_rows(sample(policy, NoiseKey(noise.seed, ids), batch_size=batch_size))[: len(noise)]
