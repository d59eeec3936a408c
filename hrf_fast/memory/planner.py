"""Planner: what a configuration needs per GPU, in bytes and in network calls, before a GPU is rented.

Weights, gradients and optimizer state are arithmetic (zero.py); activations are counted on the network itself
(footprint.py); calls come from running the configuration's own window schedule. Left out: networks of rewards and
panels, and what DeepSpeed and CUDA keep for themselves beyond the buffers named there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hrf_fast.config.options import Config
from hrf_fast.config.run_options import PRECISIONS
from hrf_fast.memory.counts import CallCounts, count_calls
from hrf_fast.memory.footprint import Footprint, measure_model
from hrf_fast.memory.zero import ENGINES, FP32, States, engine_of, model_states
from hrf_fast.policies.files import read_decoder, read_model
from hrf_fast.policies.lora import WrongTarget, add_adapters
from hrf_fast.policies.option_checks import check_options
from hrf_fast.policies.untrained import DECODERS, copied_bytes, frozen_bytes, plan_sampler, untrained_condition
from hrf_fast.training.calls import SAMPLED_TOGETHER, CallPlan

MODES = ("keep", "replay", "checkpoint")
"""Modes of a window's activations, the fastest first: kept from the rollout, computed again, or again by blocks."""
# of the memory, left to the CUDA context, workspaces and fragmentation
RESERVE = 0.1


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
    encoder: int = 0
    """Bytes of the largest text encoder, where one at a time comes to the GPU for its work."""
    condition: int = 0
    """Bytes of the embeddings of one prompt, in all branches."""
    copies: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the pretrained network's frozen copy by precision, whole on every GPU; empty where there is none."""

    @property
    def any_footprint(self) -> Footprint:
        """For what does not depend on precision or checkpointing."""
        return next(iter(self.footprints.values()))

    def modes(self, engine: str) -> tuple[str, ...]:
        """Modes that the configuration's order of updates has on an engine."""
        return MODES if may_keep(self.config) and not engine.startswith("zero3") else MODES[1:]

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
    def conditions(self) -> int:
        """The embeddings of an iteration's prompts, a row for all samples of a group."""
        return math.ceil(self.config.train.groups_per_iteration / self.gpus) * self.condition

    @property
    def trajectories(self) -> int:
        """The latents of their windows, the pretrained model's outputs there and the predicted latents, in fp32."""
        longest = self.counts.longest_window
        referred = min(longest, self.config.remedies.referred_steps(self.config.sample.num_inference_steps))
        return self.rolled_out * (longest + 1 + referred + self.predicted) * self.any_footprint.latent_bytes

    @property
    def predicted(self) -> int:
        """Clean images that are predicted for each sample: with train.gae_lambda at each step, and at the window's end
        where noise follows."""
        return 0 if self.config.train.gae_lambda is None else self.counts.longest_window + 1

    @property
    def images(self) -> int:
        """The final and the predicted images, in fp32, which wait for their rewards and are gone in an update."""
        return self.rolled_out * (1 + self.predicted) * self.any_footprint.image_bytes

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
        # a rollout decodes while its graphs are there
        beside = max(footprint.update(images) - footprint.kept(images), footprint.decoding + self.images)
        return graphs * self.counts.longest_window + beside

    def need(self, engine: str, precision: str, mode: str, images_per_call: int, *, panel: bool = True) -> float:
        """Peak bytes of an iteration, and by default of the panels between them."""
        states = self.states(engine, precision)
        sampling = self.footprints[precision, False].sampling
        together = self.rollout_images(images_per_call)
        drawn = sampling(max(self.call_plan(images_per_call).sampled, together))
        # train.gradient_noise copies the gradients of the first half of the groups, and then those of all
        copied = FP32 * sum(self.any_footprint.tensors) if self.config.train.gradient_noise else 0
        update = self.activations(mode, precision, images_per_call) + copied
        rollout = max(sampling(together), self.any_footprint.decoding) + self.images
        most = max(update, rollout, drawn, states.step + 2 * copied, self.encoder)
        most = max(most, self.panel(drawn, engine)) if panel else most
        most += self.frozen + self.any_footprint.buffer_bytes + self.copies.get(precision, 0)
        return states.together + self.trajectories + self.conditions + most

    def panel(self, sampling: float, engine: str) -> float:
        """Peak of a panel on the main rank, which holds all of its latents and images.

        Where weights are averaged it draws with the averages in their place, and they wait beside it.
        """
        size, footprint = self.config.evaluation.panel_size, self.any_footprint
        waiting = self.config.optimizer.ema_decay > 0 and not engine.startswith("zero3")
        return (
            size * footprint.latent_bytes
            + max(sampling, footprint.decoding + size * footprint.image_bytes)
            + (FP32 * sum(footprint.tensors) if waiting else 0)
        )

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
        return next((choice for mode in self.modes(engine) if (choice := self.choose(engine, precision, mode))), None)


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
    model, sample, compute = config.model, config.sample, config.compute
    files = read_model(model.name, model.revision, weights=False, max_sequence_length=model.max_sequence_length)
    check_options(files, model, sample, compute)
    decoder = read_decoder(model.decoder, weights=False) if model.decoder else None
    sampler = plan_sampler(files, sample, model.image_size)
    conditions = sample.guidance_scale > 1, sample.guidance_scale > 1 and config.train.guidance
    condition = untrained_condition(files, 1, conditions[1])
    counts = count_calls(config, sampler.stochastic_steps, branches=condition.branches)
    try:
        footprints = measure_model(
            files,
            device=device,
            guided=conditions,
            image_size=model.image_size,
            channels_last=compute.channels_last,
            offload=compute.offload,
            decoder=decoder,
            prepare=_adapters(config),
        )
    except WrongTarget:
        raise
    # diffusers checks no types: a wrong value in a config can raise nearly anything
    except Exception as error:
        raise ValueError(
            f"model.name is {model.name!r}, whose config does not run ({type(error).__name__}: {error})"
        ) from error
    engine, bucket = engine_of(config)
    beside = frozen_bytes(files, compute.encoder_precision, decoder)
    frozen = 0 if compute.offload else sum(beside.values())
    encoders = [size for name, size in beside.items() if name not in DECODERS]
    encoder = max(encoders, default=0) if compute.offload else 0
    copied = config.remedies.needs_reference and not config.lora.rank
    copies = {precision: copied_bytes(files, precision) for precision in PRECISIONS if copied}
    result = Plan(config, gpus, memory, engine, bucket, counts, footprints, frozen, encoder, condition.bytes, copies)
    if not any(result.best(engine, precision) for engine in ENGINES for precision in PRECISIONS):
        ways = {(e, p, m): result.need(e, p, m, 1) for e in ENGINES for p in PRECISIONS for m in result.modes(e)}
        least = min(ways, key=lambda way: ways[way])
        need = ways[least] / (1 - RESERVE)
        raise ValueError(
            f"nothing fits into --memory {memory / 1e9:.3g} GB on {gpus} GPUs: the least is {need / 1e9:.3g} GB a GPU, "
            f"with {', '.join(least)}, compute.images_per_call=1; use more --memory or more "
            "--gpus, fewer samples an iteration, a smaller evaluation.panel_size, or a smaller model"
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
