"""The loop as published: DDPO, HRF and HRF-D in plain code, fp32, one step and one group at a time.

Speed-ups are measured against this loop, and the published order of hrf_fast is held to its weights. It follows the HRF
authors' code (arXiv 2410.08315) and the DDIM step of the public DDPO code: per anchor a rollout, for HRF-D a
deterministic rollout of the whole group from every candidate start, then the group's rollout; when all groups are
there, one optimizer step per group, with a forward and a backward per window step.

Where it follows this project instead, so that the numbers can be compared: the deterministic last step is not trained,
images are scaled to [0, 1] before the reward, the distance of HRF-D is averaged over the group, and the noise is that
of `hrf_fast.noise`. Left out: everything else of `hrf_fast` except loading the model and the reward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from benchmarks.training_bench.configurations import METHODS
from hrf_fast.assembly.inputs import build_config_reward
from hrf_fast.assembly.model import build_policy
from hrf_fast.config.options import Config
from hrf_fast.devices import choose_device
from hrf_fast.noise import noise_generator, noise_key
from hrf_fast.prompts import Prompt
from hrf_kernels import philox_normal

# the counter of a sample's starting noise in hrf_fast.policies.sample
_START = 0xFFFFFFFF
# added to the standard deviation of a group's rewards, as published
_EPSILON = 1e-6


class Noise:
    """Standard normal noise by (purpose, first sample, step), equal to hrf_fast's and drawn before it is used.

    So the counter-based generator is no part of the literal loop's time: `torch.randn` costs next to nothing.
    """

    def __init__(self, seed: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.seed, self.shape, self.device = seed, shape, device
        self._drawn: dict[tuple[str, int, int], Tensor] = {}

    def draw(self, iteration: int, purpose: str, first: int, count: int, steps: range) -> None:
        """Draw for samples first … first + count − 1: what they start from, and every step's."""
        key, ids = noise_key(self.seed, iteration, purpose), torch.arange(first, first + count, device=self.device)
        for step in (_START, *steps):
            self._drawn[purpose, first, step] = philox_normal(self.shape, seed=key, sample_id=ids, step=step)

    def take(self, purpose: str, first: int, step: int = _START) -> Tensor:
        return self._drawn[purpose, first, step]

    def clear(self) -> None:
        self._drawn.clear()


class LiteralTrainer:
    """Weights, optimizer and the published loop; `iteration(i)` is what is timed, after `prepare(i)`."""

    def __init__(self, config: Config) -> None:
        """Load what `config` names; a ValueError names an option that the published loop does not have."""
        schedule, train, optimizer = config.window.schedule, config.train, config.optimizer
        if schedule not in METHODS.values():
            raise ValueError(f"window.schedule is {schedule!r}; the literal loop knows {', '.join(METHODS.values())}")
        for option, value, published in (
            ("compute.precision", config.compute.precision, "fp32"),
            ("sample.scheduler", config.sample.scheduler, "ddim"),
            ("train.inner_epochs", train.inner_epochs, 1),
            ("train.groups_per_step", train.groups_per_step, 1),
            ("sample.guidance_scale", config.sample.guidance_scale, 1),
            ("optimizer.warmup_iterations", optimizer.warmup_iterations, 0),
            ("optimizer.learning_rate_schedule", optimizer.learning_rate_schedule, "constant"),
        ):
            if value != published:
                raise ValueError(f"{option} is {value!r}; the literal loop is published with {published!r}")
        self.config, self.schedule = config, schedule
        policy = build_policy(config)
        self.policy, self.prompt = policy, Prompt("a cat") if policy.takes_prompts else None
        self._conditions: dict[int, dict[str, Any]] = {}
        self.unet, self.reward = policy.unet, build_config_reward(config, choose_device(config.run.device))
        scheduler = DDIMScheduler.from_config(policy.scheduler.config)
        scheduler.set_timesteps(config.sample.num_inference_steps)
        if scheduler.config.prediction_type != "epsilon":
            raise ValueError(
                f"the model predicts {scheduler.config.prediction_type!r}; the literal loop is written for 'epsilon'"
            )
        self.clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
        self.timesteps: list[int] = scheduler.timesteps.tolist()
        self.T = len(self.timesteps)
        self._set_alphas(scheduler)
        self.noise = Noise(config.run.seed, policy.latent_shape, policy.device)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.unet.parameters() if parameter.requires_grad],
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )

    def _set_alphas(self, scheduler: Any) -> None:
        """ā of every step and of the next cleaner one, as Python numbers."""
        alphas, stride = scheduler.alphas_cumprod.double(), scheduler.config.num_train_timesteps // self.T
        self.alpha = [float(alphas[t]) for t in self.timesteps]
        final = float(scheduler.final_alpha_cumprod)
        self.alpha_previous = [float(alphas[t - stride]) if t >= stride else final for t in self.timesteps]

    def predict(self, latents: Tensor, step: int) -> Tensor:
        """The UNet's output; under a prompt with its embeddings, which are encoded once."""
        return self.unet(latents, self.timesteps[step], **self.condition(len(latents))).sample

    def condition(self, count: int) -> dict[str, Any]:
        """The embeddings of `count` samples under the UNet's argument names; empty for an unconditional model."""
        if count not in self._conditions:
            inputs = self.policy.condition([self.prompt] * count).inputs
            named = {name: value for name, value in inputs.items() if name == "encoder_hidden_states"}
            added = {name: value for name, value in inputs.items() if name not in named}
            self._conditions[count] = named | ({"added_cond_kwargs": added} if added else {})
        return self._conditions[count]

    def prepare(self, iteration: int) -> None:
        """Draw the iteration's noise, outside the timing."""
        groups, size = self.config.train.groups_per_iteration, self.config.train.group_size
        self.noise.clear()
        for group in range(groups):
            if self.schedule != "full":
                self.noise.draw(iteration, "anchors", group, 1, range(self.T))
            if self.schedule == "dynamic":
                self.noise.draw(iteration, "search", group * size, size, range(0))
            self.noise.draw(iteration, "rollout", group * size, size, range(self.T))

    def iteration(self, iteration: int) -> dict[str, Any]:
        """Roll out every group, then one optimizer step per group.

        Returns:
            mean loss of the optimizer steps, mean reward and the windows, named as in metrics.jsonl.
        """
        train = self.config.train
        size, groups = train.group_size, range(train.groups_per_iteration)
        anchors = [self.anchor(group) for group in groups] if self.schedule != "full" else []
        starts = self.starts(iteration, anchors)
        rollouts = [self.rollout(start, group * size, anchors) for group, start in enumerate(starts)]
        rewards = [self.reward(self.images(latents[-1])).total for latents, _ in rollouts]
        peers = torch.cat(rewards)
        losses = []
        for start, (latents, old), group_rewards in zip(starts, rollouts, rewards, strict=True):
            # in float64: the rewards of a group differ little, and rounding their mean would shift every advantage
            among = (group_rewards if train.advantages == "group" else peers).double()
            advantages = (group_rewards - among.mean()) / (among.std() + _EPSILON)
            losses.append(self.learn(start, latents, old, advantages.float()))
        return {
            "loss": sum(losses) / len(losses),
            "reward_mean": float(peers.mean()),
            "window_starts": starts,
            "window_steps": sum(self.T - 1 - start for start in starts),
        }

    @torch.no_grad()
    def anchor(self, group: int) -> Tensor:
        """A full rollout of one image, [1, C, H, W]."""
        latents = self.noise.take("anchors", group)
        for step in range(self.T):
            mean, std = self.ddim(self.predict(latents, step), latents, step, self.config.sample.eta)
            latents = mean + std * self.noise.take("anchors", group, step)
        return latents

    def starts(self, iteration: int, anchors: list[Tensor]) -> list[int]:
        """First step of each group's window; the last step, whose std is 0, is never one."""
        groups, options = self.config.train.groups_per_iteration, self.config.window.kwargs
        if self.schedule == "full":
            return [0] * groups
        if self.schedule == "dynamic":
            return [self.search(group, anchor) for group, anchor in enumerate(anchors)]
        clusters = options.get("clusters") or [[0, self.T // 2], [self.T // 2, self.T]]
        first, stop = clusters[iteration // options.get("iterations_per_cluster", 35) % len(clusters)]
        candidates = range(first, min(stop, self.T - 1))
        generator = noise_generator(self.config.run.seed, iteration, "windows")
        return [candidates[int(i)] for i in torch.randint(len(candidates), (groups,), generator=generator)]

    @torch.no_grad()
    def search(self, group: int, anchor: Tensor) -> int:
        """HRF-D: the start after which the reward changes most while the images stay near the anchor."""
        options = self.config.window.kwargs
        candidates = list(range(0, self.T - 1, options.get("stride", 2)))
        rewards, distances = [], []
        for start in candidates:
            latents = self.renoise(anchor, start, self.noise.take("search", group * self.config.train.group_size))
            for step in range(start, self.T):
                latents, _ = self.ddim(self.predict(latents, step), latents, step, 0.0)
            rewards.append(float(self.reward(self.images(latents)).total.mean()))
            distances.append(float(1 - torch.cosine_similarity(latents.flatten(1), anchor.flatten(1)).mean()))
        change = _normalised([after - before for before, after in zip(rewards, rewards[1:], strict=False)])
        distance = _normalised(distances[1:])
        criteria = [c - options.get("beta", 0.5) * d for c, d in zip(change, distance, strict=True)]
        return candidates[criteria.index(max(criteria))]

    @torch.no_grad()
    def rollout(self, start: int, first: int, anchors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """A group from its start to the clean image.

        Returns:
            latents before every step and at the end (T − start + 1 of [B, C, H, W]), log-probs [B] of all steps but the
            deterministic last.
        """
        noise = self.noise.take("rollout", first)
        latents = [self.renoise(anchors[first // len(noise)], start, noise) if anchors else noise]
        log_probs = []
        for step in range(start, self.T):
            output = self.predict(latents[-1], step)
            mean, std = self.ddim(output, latents[-1], step, self.config.sample.eta)
            latents.append(mean + std * self.noise.take("rollout", first, step))
            if std > 0:
                log_probs.append(log_prob(latents[-1], mean, std))
        return latents, log_probs

    def learn(self, start: int, latents: list[Tensor], old: list[Tensor], advantages: Tensor) -> float:
        """One optimizer step on one group."""
        self.optimizer.zero_grad()
        loss = self.accumulate(start, latents, old, advantages)
        if self.config.optimizer.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.unet.parameters(), self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        return loss

    def accumulate(self, start: int, latents: list[Tensor], old: list[Tensor], advantages: Tensor) -> float:
        """Forward and backward of every window step [start, T − 1); the loss is their sum."""
        train = self.config.train
        scale = (self.T - start) / self.T if train.scale_clips_by_window else 1.0
        bound, clip = train.advantage_clip * scale, train.clip_range * scale
        advantages = advantages.clamp(-bound, bound)
        total = 0.0
        for index, step in enumerate(range(start, self.T - 1)):
            output = self.predict(latents[index], step)
            mean, std = self.ddim(output, latents[index], step, self.config.sample.eta)
            ratio = torch.exp(log_prob(latents[index + 1], mean, std) - old[index])
            unclipped, clipped = -advantages * ratio, -advantages * torch.clamp(ratio, 1 - clip, 1 + clip)
            loss = torch.mean(torch.maximum(unclipped, clipped))
            loss.backward()
            total += loss.item()
        return total

    def ddim(self, output: Tensor, latents: Tensor, step: int, eta: float) -> tuple[Tensor, float]:
        """Mean [B, C, H, W] and std of the next latents, equations 12 and 16 of DDIM (arXiv 2010.02502)."""
        alpha, previous = self.alpha[step], self.alpha_previous[step]
        x0 = (latents - math.sqrt(1 - alpha) * output) / math.sqrt(alpha)
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        std = eta * math.sqrt((1 - previous) / (1 - alpha) * (1 - alpha / previous))
        direction = math.sqrt(max(0.0, 1 - previous - std**2)) * output
        return math.sqrt(previous) * x0 + direction, std

    def renoise(self, anchor: Tensor, step: int, noise: Tensor) -> Tensor:
        return math.sqrt(self.alpha[step]) * anchor + math.sqrt(1 - self.alpha[step]) * noise

    def images(self, latents: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1]; a grey channel is repeated."""
        if self.prompt:
            return self.policy.decode(latents)
        images = (latents / 2 + 0.5).clamp(0, 1)
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def log_prob(following: Tensor, mean: Tensor, std: float) -> Tensor:
    """Gaussian log-density averaged over C·H·W, [B], as the DDPO code writes it."""
    density = -((following.detach() - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    return density.mean(dim=tuple(range(1, density.ndim)))


def _normalised(values: list[float]) -> list[float]:
    """Min–max to [0, 1]; a constant list gives zeros."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]
