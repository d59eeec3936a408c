"""Seconds of a run: its network calls times a rate, which is measured on this machine or stated, and never guessed.

Left out: rewards, panels, optimizer steps and checkpoints, which metrics.jsonl has as the overhead of a run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hrf_fast.config.options import Config
from hrf_fast.devices import choose_device, set_precision_flags
from hrf_fast.memory.planner import Plan
from hrf_fast.memory.table import mode_of
from hrf_fast.policies.base import Condition
from hrf_fast.policies.files import read_model
from hrf_fast.policies.lora import add_adapters
from hrf_fast.policies.network import Network
from hrf_fast.policies.untrained import untrained_condition, untrained_network
from hrf_fast.timing.calls import sampling_call, seconds, update_call
from hrf_fast.timing.tuning import set_threads

NO_RATE = (
    "seconds: no rate is known. --measure times a few calls of this model on this machine; --rate N states evaluations "
    "a second of a device, as a run has them: the growth of `evaluations` in its metrics.jsonl over `unet_seconds`"
)


class Rate(NamedTuple):
    """Seconds of an image's forward and of its backward on one device, and where they come from."""

    forward: float
    backward: float
    source: str
    counts_repeated: bool = True
    """Whether forwards that checkpointing makes again take seconds of their own; a run's rate has them in it."""


def stated(evaluations: float) -> Rate:
    """The rate of a device that makes so many evaluations a second, of which a backward is two.

    Raises:
        ValueError: not above 0.
    """
    if not 0 < evaluations < float("inf"):
        raise ValueError(f"--rate is {evaluations}; use a finite number of evaluations a second, above 0")
    return Rate(1 / evaluations, 2 / evaluations, f"{evaluations:g} evaluations a second, as stated", False)


def measured(plan: Plan) -> Rate:
    """Time calls of the sizes of a plan's run on this machine's device, with random weights."""
    config, device = plan.config, choose_device(plan.config.run.device)
    if device.type == "cuda":
        # which a clock waits for
        torch.cuda.set_device(device)
    set_precision_flags(device, deterministic=config.compute.deterministic)
    set_threads(config)
    model, compute = config.model, config.compute
    files = read_model(model.name, model.revision, weights=False, max_sequence_length=model.max_sequence_length)
    bare, shape = untrained_network(files, model.image_size)
    if config.lora.rank:
        add_adapters(bare.unet, **vars(config.lora))
    unet = bare.unet.to(device).eval()
    network = Network(unet, compute.precision, channels_last=compute.channels_last, call=bare.call)
    sampled, trained = plan.rollout_images(compute.images_per_call), plan.update_images(compute.images_per_call)

    def condition(images: int) -> Condition:
        zeros = untrained_condition(files, images, False)
        return Condition({name: tensor.to(device) for name, tensor in zeros.conditional.items()})

    forward = seconds(sampling_call(network, shape, condition(sampled), sampled)) / sampled
    both = seconds(update_call(network, shape, condition(trained), trained)) / trained
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    source = f"measured here ({name}) on calls of {sampled} and {trained} images"
    source += ", not compiled" if compute.compile != "none" else ""
    return Rate(forward, max(0.0, both - forward), source)


def seconds_line(plan: Plan, rate: Rate, target: float | None = None) -> str:
    """The seconds of an iteration, of the whole run, and to a target.

    Args:
        target: evaluations that a target takes, as a study's report has them.
    """
    mode, counts, epochs = mode_of(plan), plan.counts, plan.config.train.inner_epochs
    evaluations, backwards = counts.evaluations(mode, epochs), counts.update * epochs
    forwards = counts.forwards(mode, epochs) + rate.counts_repeated * counts.repeated(mode, epochs)
    each = (forwards * rate.forward + backwards * rate.backward) / plan.gpus
    iterations = _iterations(plan.config, evaluations)
    line = (
        f"seconds of network calls ({rate.source}; {mode}; {plan.gpus} devices): {each:.3g} an iteration, "
        f"{each * iterations:.3g} for {iterations:,.0f} iterations ({_hours(each * iterations)})"
    )
    if target is not None:
        to_target = each * target / evaluations
        line += f", {to_target:.3g} for {target:,.0f} evaluations to target ({_hours(to_target)})"
    return f"{line}; rewards, panels and optimizer steps come on top"


def _iterations(config: Config, evaluations: float) -> float:
    """Iterations until one of the run's budgets is spent."""
    limit = config.stop.max_evaluations
    return min(config.train.iterations, limit / evaluations) if limit else config.train.iterations


def _hours(value: float) -> str:
    return f"{value / 3600:.2f} h"
