"""The panel: a fixed set of noises whose images are evaluated before, during and after training.

The noise is counter-based, so two models see the very same panel, step by step; their grids can be laid side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hrf_fast.assets import SHIPPED
from hrf_fast.config.run_options import LARGEST_SEED
from hrf_fast.distributed import comm
from hrf_fast.evaluation.diversity import Interval, inception_interval, mean_interval, vendi_interval
from hrf_fast.evaluation.kept import LEAST, panel_halves
from hrf_fast.evaluation.looks import attribute_shares, looks_interval
from hrf_fast.evaluation.vendi import vendi_score
from hrf_fast.noise import NoiseKey, noise_key, seed_everything
from hrf_fast.policies.base import Policy
from hrf_fast.policies.sample import sample, sample_as_released
from hrf_fast.prompts import Prompt
from hrf_fast.prompts.draw import Prompts
from hrf_fast.rewards import CombinedReward
from hrf_fast.rewards.registry import NotFiniteError
from hrf_fast.vision.base import FeatureClassifier, FeatureNetwork
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
    vendi_per_prompt: Interval | None = None
    """Mean of the Vendi Scores of the images of one prompt."""
    looks: Interval | None = None
    """Effective number of looks, where the network is a classifier of several attributes."""
    attributes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Share of each value of every attribute, with `looks`."""
    prompts: tuple[str, ...] = ()
    """Texts, each of equally many images, in the order of the images; empty for an unconditional model."""
    features: Tensor | None = None
    """[N, D] on the CPU, where there is a network."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """Mean of each term of a sum of rewards; empty for a single reward."""
    held_out: Mapping[str, Interval] = field(default_factory=dict)
    """Mean of each held-out reward."""
    halves: Mapping[str, Tensor] = field(default_factory=dict)
    """[1 + DRAWS] of every metric that has a share of the pretrained model's: `evaluation.kept`."""

    @property
    def samples(self) -> dict[str, int]:
        """How many samples the halves of a metric are of: prompts or images."""
        counts = {"vendi_per_prompt": len(self.prompts)}
        return {name: counts.get(name, len(self.images)) for name in self.halves}

    def record(self) -> dict[str, Any]:
        """JSON-able: every interval as [value, low, high], and the rewards of each image for paired comparison."""
        names = ("reward", "vendi", "vendi_per_prompt", "looks", "inception")
        intervals: dict[str, Interval | None] = {name: getattr(self, name) for name in names}
        metrics: dict[str, Any] = {name: list(interval) for name, interval in intervals.items() if interval is not None}
        largest = max(map(abs, self.rewards))
        # six decimals, and six digits of rewards in smaller units
        decimals = max(6, 5 - math.floor(math.log10(largest))) if largest else 6
        if self.terms:
            metrics["terms"] = dict(self.terms)
        if self.held_out:
            metrics["held_out"] = {name: list(interval) for name, interval in self.held_out.items()}
        if self.attributes:
            metrics["attributes"] = {
                name: {value: round(share, 4) for value, share in shares.items()}
                for name, shares in self.attributes.items()
            }
        if self.prompts:
            metrics["prompts"] = list(self.prompts)
        return {**metrics, "rewards": [round(value, decimals) for value in self.rewards]}


@dataclass(frozen=True)
class Panel:
    """Which noises are evaluated, and with what network and held-out rewards."""

    size: int
    """Images; the first n of a larger panel are the smaller panel."""
    seed: int
    """Seed of the panel's noise, and of its bootstrap."""
    images_per_call: int
    network: FeatureNetwork | None = None
    """Features for the Vendi Score, and for the Inception Score where it is a classifier."""
    prompts: tuple[Prompt, ...] = ()
    """Fixed prompts, used again from the first where the panel has more; empty for an unconditional model."""
    images_per_prompt: int = 1
    """Images of one prompt, one after the other."""
    deterministic_steps: int = 0
    """Steps of `Policy.deterministic_sampler` that images are drawn by; 0 for the policy's own sampler."""
    held_out: Mapping[str, CombinedReward] = field(default_factory=dict)
    """Rewards by name that are measured and not trained on; on the main rank alone."""
    source: dict[str, str] | None = None
    """The user's file or function of the prompts, as `source_of` gives it, where they are not the training's."""

    def evaluate(self, policy: Policy, reward: CombinedReward) -> PanelMetrics:
        """Sample the panel and compute its metrics, on all ranks together."""
        # a reward that draws random numbers draws the same for every panel
        seed_everything(self.seed, 0)
        latents = self._sample(policy)
        measured: PanelMetrics | None = None
        with comm.agreed():
            if comm.is_main():
                measured = self._measure(policy.decode(latents), reward)
        # the images of a large panel are gigabytes, and only the main rank shows them
        without_images = comm.broadcast(measured and replace(measured, images=measured.images[:0].clone()))
        result = measured or without_images
        assert result is not None
        return result

    def images(self, policy: Policy) -> Tensor:
        """The panel's images [N, 3, H, W] in [0, 1]; each rank denoises its share."""
        latents = self._sample(policy)
        with comm.agreed():
            return policy.decode(latents)

    def noise(self, policy: Policy) -> NoiseKey:
        """The noise of the panel's images."""
        return NoiseKey(noise_key(self.seed, 0, "panel"), torch.arange(self.size, device=policy.device))

    def with_prompts(self, prompts: Prompts, images_per_prompt: int) -> Panel:
        """The panel with the source's fixed prompts.

        Raises:
            ValueError: images_per_prompt does not divide the panel's size.
        """
        if rest := self.size % images_per_prompt:
            raise ValueError(
                f"evaluation.panel_size is {self.size}, which evaluation.images_per_prompt {images_per_prompt} does "
                f"not divide; use {self.size + images_per_prompt - rest}, or another number of images per prompt"
            )
        fixed = prompts.fixed(self.seed, self.size // images_per_prompt)
        return replace(self, prompts=tuple(fixed), images_per_prompt=images_per_prompt)

    def with_next_seed(self) -> Panel:
        """The panel from other noise; after the largest seed comes 0."""
        return replace(self, seed=(self.seed + 1) % (LARGEST_SEED + 1))

    @property
    def shares(self) -> set[str]:
        """Metrics that have a share of the pretrained model's; a panel of few images has none."""
        names: set[str] = set()
        if self.network is None:
            return names
        if self.size >= LEAST:
            names |= {"vendi", "precision"}
            heads = self.network.labels if isinstance(self.network, FeatureClassifier) else {}
            names |= {"inception"} if "label" in heads else set()
            names |= {"looks"} if len(heads) > 1 else set()
        if self.has_vendi_per_prompt and self.size // self.images_per_prompt >= LEAST:
            names.add("vendi_per_prompt")
        return names

    @property
    def has_vendi_per_prompt(self) -> bool:
        """Whether the images of one prompt have a Vendi Score of their own; one prompt's is the whole panel's."""
        return bool(self.prompts) and 1 < self.images_per_prompt < self.size

    @property
    def note(self) -> str:
        """A line where the prompts are used more than once; else empty."""
        wanted = self.size // self.images_per_prompt
        if not self.prompts or len(self.prompts) == wanted:
            return ""
        return (
            f"the panel of {self.size} images has {wanted} prompts of {self.images_per_prompt} images each, but its "
            f"source has {len(self.prompts)}: they are used again from the first"
        )

    @property
    def held_out_sources(self) -> dict[str, dict[str, str] | None]:
        """The user's files or functions of held-out rewards by name, for a run's record."""
        return {f"held-out {name}": source for held in self.held_out.values() for name, source in held.sources.items()}

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt of every `images_per_prompt` images; empty for an unconditional model."""
        first = range(0, self.size if self.prompts else 0, self.images_per_prompt)
        return tuple(prompt.text for prompt in map(self.prompt, first) if prompt is not None)

    def prompt(self, image: int) -> Prompt | None:
        """The prompt of an image; None for an unconditional model."""
        return self.prompts[image // self.images_per_prompt % len(self.prompts)] if self.prompts else None

    def _sample(self, policy: Policy) -> Tensor:
        """The panel's latents on every rank; each rank denoises its share."""
        noise = self.noise(policy)
        share = -(-len(noise) // comm.world_size())
        # ranks denoise equally many, the last ones again what others do
        ids = noise.sample_id[(torch.arange(share) + comm.rank() * share).clamp(max=len(noise) - 1)]
        return comm.gather_rows(self.denoise(policy, NoiseKey(noise.key, ids)))[: len(noise)]

    def denoise(self, policy: Policy, noise: NoiseKey) -> Tensor:
        """Clean latents [B, …] of the panel's images whose numbers are the noise's sample ids."""
        prompts = [self.prompt(image) for image in noise.sample_id.tolist()]
        steps, most = self.deterministic_steps, self.images_per_call
        if steps:
            return sample_as_released(policy, noise, prompts, steps=steps, images_per_call=most)
        return sample(policy, noise, prompts, images_per_call=most)

    def _measure(self, images: Tensor, reward: CombinedReward) -> PanelMetrics:
        prompts = [self.prompt(image) for image in range(self.size)]
        try:
            total, by_term = reward(images, prompts)
            measured = {name: held(images, prompts).total.cpu() for name, held in self.held_out.items()}
        except NotFiniteError as error:
            raise NotFiniteError(
                f"{error}. These are a panel's images, and stop.on_nan=skip is about training alone: return a finite "
                "number for such images"
            ) from error
        rewards, terms = total.cpu(), {name: float(values.mean()) for name, values in by_term.items()}
        vendi = inception = per_prompt = looks = None
        attributes: dict[str, dict[str, float]] = {}
        log_probs: dict[str, Tensor] = {}
        halves: dict[str, Tensor] = {}
        on_cpu = None
        if self.network is not None:
            features, of_prompts = self.network.features(images), None
            on_cpu = features.cpu()
            vendi = vendi_interval(on_cpu, seed=self.seed)
            if self.has_vendi_per_prompt:
                parts = on_cpu.split(self.images_per_prompt)
                of_prompts = torch.tensor([vendi_score(part) for part in parts], dtype=torch.float64)
                per_prompt = mean_interval(of_prompts, seed=self.seed)
            if isinstance(self.network, FeatureClassifier):
                log_probs = {name: values.cpu() for name, values in self.network.log_probs_of(features).items()}
                if "label" in log_probs:
                    inception = inception_interval(log_probs["label"], seed=self.seed)
                if len(log_probs) > 1:
                    looks = looks_interval(log_probs, seed=self.seed)
                    attributes = attribute_shares(log_probs, self.network.labels)
            halves = panel_halves(on_cpu, log_probs, of_prompts, seed=self.seed)
        return PanelMetrics(
            images=images.cpu(),
            rewards=rewards.tolist(),
            reward=mean_interval(rewards, seed=self.seed),
            vendi=vendi,
            inception=inception,
            vendi_per_prompt=per_prompt,
            looks=looks,
            attributes=attributes,
            prompts=self.texts,
            features=on_cpu,
            terms=terms if len(terms) > 1 else {},
            held_out={name: mean_interval(values, seed=self.seed) for name, values in measured.items()},
            halves=halves,
        )


def choose_network(spec: str, model_name: str, device: torch.device) -> FeatureNetwork | None:
    """The feature network of evaluation.network; `auto` is the shipped model's own, and none for other models."""
    if spec == "auto":
        spec = model_name if model_name in SHIPPED else "none"
    if spec == "none":
        return None
    return load_feature_network("evaluation.network", spec, device)


def no_network_note(network: str, model: str) -> str:
    """A line for a model of the user's, whose panels would lack the diversity without a word.

    Args:
        network: evaluation.network; model: model.name.
    """
    if network != "auto" or model in SHIPPED:
        return ""
    return (
        f"evaluation.network is auto, which has no network for model.name {model}: panels will lack the Vendi Score, "
        "and a loss of diversity won't show; set evaluation.network=openai/clip-vit-base-patch32 or another vision "
        f"network ({' and '.join(SHIPPED)} are shipped), or none to do without"
    )
