"""Functions that the ranks of the tests run, each on every rank."""

import ctypes
import functools
import itertools
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch


def coarse(images, prompts=None):
    """A reward that the fp32 rounding of an image does not move, where standardising a smooth one magnifies it."""
    return (images.mean((1, 2, 3)) * 200).round()


def fine(images, prompts=None):
    """`coarse` for the images of an untrained decoder, which hardly differ, that reads the prompts too."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return (images.mean((1, 2, 3)) * 2000).round() + lengths


def drawn():
    """A prompt as TRL's prompt_fn returns it; the second rank would draw others than the first."""
    word = "red" if os.environ.get("RANK") == "1" else "cat"
    return f"{word} {random.randrange(100)}", {}


@functools.cache
def _network(log):
    """A network that is made at the first call, in one line of the log."""
    _log(log, "network")
    return torch.nn.Flatten()


def logged(images, prompts=None, *, log):
    """The brightness by a network of the rank's own; the rank's log has a line with the images of every call."""
    _log(log, len(images))
    return _network(log)(images).mean(1)


def _log(log, line):
    with Path(f"{log}-{os.environ['RANK']}").open("a") as file:
        file.write(f"{line}\n")


_panels = 0


def peaked(images, prompts=None):
    """A reward whose panels, of two images each, are best after one iteration, run after run of three panels."""
    global _panels
    if len(images) != 2:
        return coarse(images)
    _panels += 1
    return images.new_full((2,), (0.0, 5.0, 1.0)[(_panels - 1) % 3])


_rewarded = 0


def failing(images, prompts=None):
    """A reward that the second rank can compute for one group only."""
    global _rewarded
    _rewarded += 1
    if os.environ["RANK"] == "1" and _rewarded > 1:
        raise KeyError("no model")
    return images.mean((1, 2, 3))


class FailingSchedule:
    """A schedule that both ranks can ask in one iteration only."""

    needs_anchors = False

    def __init__(self, *, num_inference_steps, stop):
        self.stop = stop

    def __call__(self, iteration, num_groups, *, generator, probe):
        from hrf_fast.windows.base import Window

        return [Window(0, self.stop)] * {0: num_groups}[iteration]


def failing_advantages():
    """Advantages that the second rank can compute in one iteration only."""
    asked = []

    def centred(rewards, prompts):
        asked.append(rewards)
        if os.environ["RANK"] == "1" and len(asked) > 1:
            raise KeyError("no model")
        return {group: values - values.mean() for group, values in rewards.items()}

    return centred


def holding(images, prompts=None):
    """A reward of native code that keeps Python's lock on the second rank for more than half a minute."""
    if os.environ["RANK"] == "1":
        ctypes.PyDLL(None).sleep(35)
    return images.mean((1, 2, 3))


def run(words: Sequence[str]) -> int:
    """A whole run by its command line; returns the exit code."""
    from hrf_fast.train import main

    return main(words)


def wrecked_on_one_rank(words: Sequence[str]) -> int:
    """`run`, whose second rank has images that are not finite in the first of its two packs of iteration 1."""
    from hrf_fast.distributed import comm
    from hrf_fast.training import collect

    made, rollout = itertools.count(), collect.rollout

    def fails_once(*arguments: Any, **options: Any) -> Any:
        if next(made) == 2 and comm.rank() == 1:
            raise FloatingPointError("the images are not finite on this rank alone")
        return rollout(*arguments, **options)

    with mock.patch.object(collect, "rollout", fails_once):
        return run(words)


class FourGroups(NamedTuple):
    """An iteration of four groups in one optimizer step: the arguments of `update`, which a rank's share is in."""

    components: Any
    rolled_out: Any
    windows: list
    advantages: dict[int, torch.Tensor]
    steps: list[int]


def four_groups(words: Sequence[str]) -> FourGroups:
    """Groups of windows from 0, 4, 2 and 3 to 5.

    Every engine sees the same data to the bit: the rollouts are made before it lays out the weights anew, by weights
    that are aligned as it will align them (`load_policy` says why; a step of std 0.01 magnifies the rounding of
    unaligned ones to 2e-5 of the gradient).
    """
    from hrf_fast.assembly.algorithm import build_algorithm, build_call_plan, build_groups
    from hrf_fast.assembly.model import build_engine, build_policy
    from hrf_fast.config.load import load_config
    from hrf_fast.noise import NoiseKey, noise_key
    from hrf_fast.prompts import Prompt
    from hrf_fast.training.components import Components
    from hrf_fast.training.groups import Group
    from hrf_fast.training.rollout import Rollout, rollout
    from hrf_fast.windows.base import Window

    config = load_config(words)
    policy, groups, plan = build_policy(config), build_groups(config), build_call_plan(config)
    if config.compute.activations == "checkpoint":
        policy.network.checkpoint_activations()
    windows = [Window(start, 5) for start in (0, 4, 2, 3)]
    # an unconditional model has no use for the prompts
    conditions = [policy.condition([Prompt(f"cat {number}")] * groups.size) for number in range(len(windows))]
    rolled_out = Rollout()
    for number in groups.own():
        noise = NoiseKey(noise_key(0, 0, "rollout"), torch.tensor(groups.sample_ids(number)))
        rolled_out.join(rollout(policy, [Group(number, windows[number], noise, conditions[number])], plan))
    engine = build_engine(policy, config)
    for call in rolled_out.calls if config.compute.activations == "keep" else []:
        # as the rollout keeps them, on latents that are equal for every engine
        (piece,), step = call.pieces, call.steps.start
        latents = rolled_out.trajectories[piece.group].latents[step - windows[piece.group].start, piece.samples]
        call.prediction = policy.predict(latents, step, conditions[piece.group][piece.samples])
    generator = torch.Generator().manual_seed(3)
    advantages = {group: torch.randn(groups.size, generator=generator) for group in range(len(windows))}
    unused: dict[str, Any] = dict.fromkeys(("reward", "rewarder", "schedule", "advantages", "panel", "noise_scale"))
    algorithm = build_algorithm(config, policy.sampler)
    components = Components(policy, engine, groups=groups, call_plan=plan, algorithm=algorithm, **unused)
    return FourGroups(components, rolled_out, windows, advantages, [0])


def gradient(words: Sequence[str]) -> tuple[torch.Tensor, float]:
    """The gradient of one optimizer step on all four groups, and its norm."""
    from hrf_fast.training.update import update

    iteration = four_groups(words)
    engine = iteration.components.engine
    # low enough not to overflow
    engine.loss_scale.value = 1024.0 if iteration.components.policy.precision == "fp16" else 1.0
    steps, _ = update(*iteration, iteration=0, note=print)
    tensors, _ = engine.optimizer_state()
    count = sum(name.endswith("exp_avg") for name in tensors)
    # AdamW's first average is (1 - beta1) times the gradient
    flat = [tensors[f"{index}.exp_avg"].flatten() / 0.1 for index in range(count)]
    return (torch.cat(flat) if flat else torch.empty(0)), float(steps[0].grad_norm)


def not_finite(words: Sequence[str]) -> list:
    """A NaN in the last group, of the second rank: what stays, and whether the next step is made."""
    from hrf_fast.training.update import update

    iteration = four_groups([*words, "stop.on_nan=skip"])
    components, notes = iteration.components, []

    def weights():
        with components.engine.gathered():
            return torch.cat([value.flatten().clone() for value in components.engine.weights().values()])

    components.engine.set_learning_rate(0.01)
    before = weights()
    broken = iteration._replace(advantages=iteration.advantages | {3: iteration.advantages[3] * torch.nan})
    made, skipped = update(*broken, iteration=7, note=notes.append)
    unchanged = bool(torch.equal(weights(), before))
    again, _ = update(*iteration, iteration=7, note=notes.append)
    after = weights()
    finite = bool(after.isfinite().all()) and not torch.equal(after, before)
    stopping = replace(components, algorithm=replace(components.algorithm, skip_not_finite=False))
    try:
        update(*broken._replace(components=stopping), iteration=7, note=notes.append)
        message = ""
    except FloatingPointError as error:
        message = str(error)
    return [len(made), skipped, unchanged, len(again), finite, notes, message]


def experts() -> list:
    """Weights of two experts after a step in which each rank has used one, and of one that none has used."""
    from hrf_fast.config.options import OptimizerConfig
    from hrf_fast.distributed import comm
    from hrf_fast.engines.plain import PlainEngine

    model = torch.nn.ParameterList([torch.tensor([1.0, 1.0]) for _ in range(3)])
    options = OptimizerConfig(weight_decay=0.0, kwargs={"eps": 1.0}, max_grad_norm=0.0)
    engine = PlainEngine(model, options)
    engine.set_learning_rate(1.0)
    with engine.accumulating():
        # gradients (2, 4) of the first and (6, 8) of the second: (1, 2) and (3, 4) on average
        factors = torch.tensor([[2.0, 4.0], [6.0, 8.0]])[comm.rank()]
        engine.backward((model[comm.rank()] * factors).sum())
    engine.step()
    return comm.gather([weight.tolist() for weight in model])


def collectives() -> list:
    """gather, gather_rows, broadcast, average, main_says, what agreed raises, and the main rank's tensors."""
    from hrf_fast.distributed import comm

    rank = comm.rank()
    tensors = [torch.full((2,), float(rank)), torch.tensor([[10.0 * rank]])]
    comm.average(tensors)
    seen = [comm.gather(rank), comm.gather_rows(torch.tensor([rank])).tolist(), comm.broadcast(f"from {rank}")]
    seen += [[tensor.tolist() for tensor in tensors], comm.main_says(lambda: rank)]
    named = {"a": torch.tensor([5.0])} if rank == 0 else {}
    seen.append([(name, value.item()) for name, value in comm.broadcast_tensors(named)])
    try:
        with comm.agreed():
            if rank == 1:
                raise ValueError("only here")
    except ValueError as error:
        seen.append(str(error))
    try:
        comm.main_says(lambda: [][0])
    except IndexError as error:
        seen.append(str(error))
    # a network that each rank has made for itself
    torch.manual_seed(rank)
    network = torch.nn.BatchNorm2d(3).requires_grad_(False)
    network.running_mean.normal_()
    layer = torch.nn.Conv2d(3, 3, 3).to(memory_format=torch.channels_last)
    comm.take_main([*network.buffers(), *layer.parameters()])
    weights = comm.gather([*network.running_mean.tolist(), *layer.weight.flatten().tolist()])
    torch.manual_seed(0)
    torch.nn.BatchNorm2d(3).running_mean.normal_()
    seen.append([len(set(map(tuple, weights))), weights[0] == [*network.running_mean.tolist(), *weights[0][3:]]])
    return seen
