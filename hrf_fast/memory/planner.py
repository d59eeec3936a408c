"""Planner: what a configuration needs per GPU, in bytes and in UNet calls, before a GPU is rented.

Weights, gradients and optimizer state are arithmetic (zero.py); activations are counted on the UNet itself
(footprint.py); UNet calls come from running the configuration's own window schedule. Left out: networks of rewards and
panels, and what DeepSpeed and CUDA keep for themselves beyond the buffers named there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hrf_fast.config.options import Config
from hrf_fast.config.run_options import PRECISIONS
from hrf_fast.memory.footprint import Footprint, measure_model
from hrf_fast.memory.zero import ENGINES, States, engine_of, model_states
from hrf_fast.noise import noise_generator
from hrf_fast.policies.checks import check_options
from hrf_fast.policies.files import read_model
from hrf_fast.policies.lora import WrongTarget, add_adapters
from hrf_fast.policies.untrained import copied_bytes, frozen_bytes, plan_sampler
from hrf_fast.training.calls import SAMPLED_TOGETHER, CallPlan
from hrf_fast.windows.base import evaluations
from hrf_fast.windows.schedules import build_schedule

MODES = ("keep", "replay", "checkpoint")
"""Modes of a window's activations, the fastest first: kept from the rollout, computed again, or again by blocks."""
# of the memory, left to the CUDA context, workspaces and fragmentation
RESERVE = 0.1


@dataclass(frozen=True)
class CallCounts:
    """Images through the network per iteration over all GPUs, a guided one counting two; the mean over the run."""

    anchors: float
    search: float
    rollout: float
    update: float
    longest_window: int
    """In steps."""
    reference: float = 0.0
    """Through the pretrained model, where the loss has a term of it."""

    def forwards(self, mode: str, inner_epochs: int) -> float:
        """Forwards without those that checkpointing repeats; `keep` needs none in the first epoch of the update."""
        sampled = self.anchors + self.search + self.rollout + self.reference
        return sampled + self.update * (inner_epochs - (mode == "keep"))

    def evaluations(self, mode: str, inner_epochs: int) -> float:
        """Cost in forwards, a backward counting two."""
        again = inner_epochs if mode == "checkpoint" else 0
        return self.forwards(mode, inner_epochs) + self.update * (2 * inner_epochs + again)


def count_calls(config: Config, stop: int, schedule: str | Callable[..., Any] | None = None) -> CallCounts:
    """Run a window schedule of the configuration's (or another one) over the run's iterations, 1000 at most, and count.

    It is a schedule of its own: what it is shown here must not get into the run's memory.

    The search of a schedule that probes (HRF-D) is counted as it asks; what it would measure is not known before the
    run, so random numbers stand in for it: exact for exact and x0, and for a bandit as many candidates as in the run,
    but not the same ones.
    """
    train, steps = config.train, config.sample.num_inference_steps
    windows = build_schedule(
        schedule or config.window.schedule, config.window.kwargs, num_inference_steps=steps, stop=stop
    )
    stand_in = torch.Generator().manual_seed(config.run.seed)
    iterations = min(train.iterations, 1000)
    groups, size = train.groups_per_iteration, train.group_size
    searched, lengths, run_steps, referred = 0, [], 0, 0
    last_referred = config.remedies.referred_steps(steps)

    def probe(candidates: Sequence[Sequence[int]], *, estimate: str = "exact") -> list[tuple[Tensor, Tensor]]:
        nonlocal searched
        searched += sum(evaluations(start, steps, estimate) for starts in candidates for start in starts) * size
        return [
            (torch.rand(len(starts), generator=stand_in), torch.rand(len(starts), generator=stand_in))
            for starts in candidates
        ]

    for iteration in range(iterations):
        generator = noise_generator(config.run.seed, iteration, "windows")
        for window in windows(iteration, groups, generator=generator, probe=probe):
            lengths.append(len(window))
            run_steps += steps - window.start
            referred += max(0, min(window.stop, last_referred) - window.start)
    # anchors are drawn in the first of every `anchor_reuse` iterations
    draws = math.ceil(iterations / config.window.anchor_reuse) / iterations
    branches = 2 if config.sample.guidance_scale > 1 and train.guidance else 1
    return CallCounts(
        anchors=branches * groups * (config.window.anchor_steps or steps) * draws if windows.needs_anchors else 0.0,
        search=branches * searched / iterations,
        rollout=branches * run_steps * size / iterations,
        update=branches * train.step_share * sum(lengths) * size / iterations,
        longest_window=stop if searched else max(lengths),
        reference=branches * referred * size / iterations,
    )


@dataclass(frozen=True)
class Choice:
    """A way to run: engine, precision, mode of activations, and the largest calls that fit; bytes per GPU."""

    engine: str
    precision: str
    mode: str
    images_per_call: int
    bytes: float


@dataclass(frozen=True)
class Plan:
    """Needs of a configuration on `gpus` GPUs of `memory` bytes each; all bytes are per GPU."""

    config: Config
    gpus: int
    memory: int
    engine: str
    bucket: int
    counts: CallCounts
    footprints: dict[tuple[str, bool], Footprint]
    frozen: int = 0
    """Bytes of text encoders and decoder, where they stay on the GPU."""
    copies: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the pretrained network's frozen copy by precision, whole on every GPU; empty where there is none."""

    @property
    def any_footprint(self) -> Footprint:
        """For what does not depend on precision or checkpointing."""
        return next(iter(self.footprints.values()))

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes that the configuration's order of updates has."""
        return MODES if may_keep(self.config) and not self.engine.startswith("zero3") else MODES[1:]

    def states(self, engine: str, precision: str | None = None) -> States:
        """Bytes that stay, for the configuration's precision or another one."""
        optimizer = self.config.optimizer
        footprint = self.footprints[precision or self.config.compute.precision, False]
        return model_states(
            footprint.tensors,
            frozen=footprint.frozen_bytes,
            engine=engine,
            gpus=self.gpus,
            optimizer=optimizer.name,
            bucket=self.bucket,
            ema=optimizer.ema_decay > 0,
        )

    @property
    def rolled_out(self) -> int:
        """Images that are rolled out before the next update."""
        train = self.config.train
        groups = train.groups_per_step if train.order == "on_policy" else train.groups_per_iteration
        return math.ceil(groups / self.gpus) * train.group_size

    @property
    def trajectories(self) -> int:
        """The latents of their windows, the pretrained model's outputs there and the final images, in fp32."""
        longest = self.counts.longest_window
        referred = min(longest, self.config.remedies.referred_steps(self.config.sample.num_inference_steps))
        return self.rolled_out * (longest + referred + 2) * self.any_footprint.image_bytes

    @property
    def kept_samples(self) -> int:
        """Images whose graphs `keep` holds at once: those of an optimizer step."""
        train = self.config.train
        return math.ceil(train.groups_per_step / self.gpus) * train.group_size

    def call_plan(self, images_per_call: int) -> CallPlan:
        train = self.config.train
        return CallPlan(train.group_size, images_per_call, train.order)

    def rollout_images(self, images_per_call: int) -> int:
        """Most images in a call of a rollout."""
        return max(self.call_plan(images_per_call).piece, min(images_per_call, self.rolled_out))

    def update_images(self, images_per_call: int) -> int:
        """Most images in a call of a replay."""
        plan = self.call_plan(images_per_call)
        if plan.order == "on_policy":
            return self.rollout_images(images_per_call)
        return plan.piece * min(plan.steps_per_call, self.counts.longest_window)

    def activations(self, mode: str, precision: str, images_per_call: int) -> float:
        """Peak of the update besides states and trajectories.

        `keep` holds the graphs of `kept_samples` over the longest window; the other modes hold one call's.
        """
        footprint = self.footprints[precision, mode == "checkpoint"]
        if mode != "keep":
            return footprint.update(self.update_images(images_per_call))
        images = self.rollout_images(images_per_call)
        calls = math.ceil(self.kept_samples / images)
        graphs = footprint.kept.fixed * calls + footprint.kept.per_image * self.kept_samples
        return graphs * self.counts.longest_window + footprint.update(images) - footprint.kept(images)

    def need(self, engine: str, precision: str, mode: str, images_per_call: int) -> float:
        """Peak bytes of an iteration."""
        states = self.states(engine, precision)
        sampled = max(self.call_plan(images_per_call).sampled, self.rollout_images(images_per_call))
        sampling = self.footprints[precision, False].sampling(sampled)
        most = max(self.activations(mode, precision, images_per_call), sampling, states.step)
        return states.together + self.frozen + self.copies.get(precision, 0) + self.trajectories + most

    def choose(self, engine: str, precision: str, mode: str) -> Choice | None:
        """The configuration's calls, or the largest smaller ones, if any fit."""
        most = self.config.compute.images_per_call
        halves = {(most or SAMPLED_TOGETHER) // 2**k for k in range(1, 20)} - {0}
        for images_per_call in (most, *sorted(halves, reverse=True)):
            need = self.need(engine, precision, mode, images_per_call)
            if need <= self.memory * (1 - RESERVE):
                return Choice(engine, precision, mode, images_per_call, need)
        return None

    def best(self, engine: str, precision: str) -> Choice | None:
        """The fastest mode that the trainer has and that fits, or None."""
        return next((choice for mode in self.modes if (choice := self.choose(engine, precision, mode))), None)


def may_keep(config: Config) -> bool:
    """Whether an update follows its rollout before the weights change, once."""
    return config.train.order == "on_policy" and config.train.inner_epochs == 1


def plan(config: Config, *, gpus: int, memory: int, device: str = "cuda") -> Plan:
    """Plan a configuration without its weights and without a GPU.

    Args:
        memory: bytes per GPU; device: cuda or cpu, whose autocast rules differ.

    Raises:
        ValueError: gpus < 1, a model or schedule that can't work, or nothing that fits (says what would).
    """
    if gpus < 1:
        raise ValueError(f"--gpus is {gpus}; use at least 1")
    files = read_model(config.model.name, config.model.revision, weights=False)
    sample = config.sample
    check_options(
        config.model.name,
        files.takes_prompts,
        guidance_scale=sample.guidance_scale,
        decoder=config.model.decoder,
        offload=config.compute.offload,
    )
    sampler = plan_sampler(files, kind=sample.scheduler, num_inference_steps=sample.num_inference_steps, eta=sample.eta)
    counts = count_calls(config, sampler.stochastic_steps)
    try:
        guided = sample.guidance_scale > 1
        footprints = measure_model(
            files, device=device, guided=(guided, guided and config.train.guidance), prepare=_adapters(config)
        )
    except WrongTarget:
        raise
    # diffusers checks no types: a wrong value in a config can raise nearly anything
    except Exception as error:
        raise ValueError(
            f"model.name is {config.model.name!r}, whose UNet config does not run ({type(error).__name__}: {error})"
        ) from error
    engine, bucket = engine_of(config)
    frozen = 0 if config.compute.offload else frozen_bytes(files)
    copied = config.remedies.needs_reference and not config.lora.rank
    copies = {precision: copied_bytes(files, precision) for precision in PRECISIONS if copied}
    result = Plan(config, gpus, memory, engine, bucket, counts, footprints, frozen, copies)
    if not any(result.best(engine, precision) for engine in ENGINES for precision in PRECISIONS):
        ways = {(e, p, m): result.need(e, p, m, 1) for e in ENGINES for p in PRECISIONS for m in result.modes}
        least = min(ways, key=lambda way: ways[way])
        need = ways[least] / (1 - RESERVE)
        raise ValueError(
            f"nothing fits into --memory {memory / 1e9:.3g} GB on {gpus} GPUs: the least is {need / 1e9:.3g} GB a GPU, "
            f"with {', '.join(least)}, compute.images_per_call=1; use more --memory or more "
            "--gpus, fewer samples an iteration, or a smaller model"
        )
    return result


def _adapters(config: Config) -> Callable[[Any, str], None] | None:
    """Make of a UNet in fp32 what the configuration trains; None for one that is trained whole."""
    lora = config.lora
    if not lora.rank:
        return None

    def prepare(unet: Any, precision: str) -> None:
        # of the other precisions the table shows what they would need
        stored = "fp32" if lora.base_precision == "fp32" else precision
        add_adapters(unet, **{**vars(lora), "base_precision": stored})

    return prepare
