"""Measuring candidate starts on a model: rewards and distances for the searches to choose from, and the time taken."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.search_bench.regret import SEARCHES, make
from hrf_fast.assembly.algorithm import build_call_plan
from hrf_fast.assembly.inputs import build_config_reward
from hrf_fast.assembly.model import build_policy
from hrf_fast.config.options import Config
from hrf_fast.noise import NoiseKey, noise_generator, noise_key
from hrf_fast.policies.sample import sample
from hrf_fast.training.probe import probe_starts


class Prober:
    """A model and a reward with the arguments of the command line; `seconds` has a value per measurement, by search."""

    def __init__(self, config: Config, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments = arguments
        self.policy, self.reward = build_policy(config), build_config_reward(config, device)
        self.images_per_call = build_call_plan(config).sampled
        self.candidates = list(range(0, self.policy.sampler.stochastic_steps, arguments.stride))
        self.seconds: dict[str, list[float]] = {name: [] for name in SEARCHES}
        # sample numbers, a group of independent noise each
        self._groups = list(
            torch.arange(arguments.noises * arguments.group_size, device=device).split(arguments.group_size)
        )

    def anchors(self) -> Tensor:
        """Clean latents, one per anchor."""
        numbers = torch.arange(self.arguments.anchors, device=self.policy.device)
        noise = NoiseKey(noise_key(self.arguments.seed, 0, "anchors"), numbers)
        return sample(self.policy, noise, images_per_call=self.images_per_call)

    def measure(self, index: int, anchor: Tensor, estimate: str) -> Tensor:
        """Mean rewards and distances of all candidates by every group of noise, [groups, 2, C]."""
        probe = self._timed(index, anchor, self._groups, estimate)
        means = probe([self.candidates] * len(self._groups), estimate=estimate)
        return torch.stack([torch.stack(group) for group in means])

    def time_bandit(self, index: int, anchor: Tensor, name: str) -> None:
        """Time a fresh bandit, whose pulls are of random arms, on the first group."""
        draw = noise_generator(self.arguments.seed, index, "windows")
        make(self.arguments, name)(0, 1, generator=draw, probe=self._timed(index, anchor, self._groups[:1], name))

    def _timed(self, index: int, anchor: Tensor, groups: Sequence[Tensor], name: str) -> Callable[..., Any]:
        """A probe of groups that share an anchor; it adds its seconds per sample to those of the search `name`."""
        key = noise_key(self.arguments.seed, 1 + index, "search")

        def probe(candidates: Sequence[Sequence[int]], *, estimate: str = "exact") -> list[tuple[Tensor, Tensor]]:
            started = time.perf_counter()
            means = probe_starts(
                self.policy,
                self.reward,
                [anchor] * len(groups),
                candidates,
                [NoiseKey(key, group) for group in groups],
                estimate=estimate,
                images_per_call=self.images_per_call,
            )
            self.seconds[name].append((time.perf_counter() - started) / sum(map(len, groups)))
            return means

        return probe
