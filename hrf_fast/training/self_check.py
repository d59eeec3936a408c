"""The self-check before training: is the ratio of an on-policy replay 1, and far enough within the clip range?

A rollout and its update compute the log-prob of a step twice. If the two disagree by as much as the clip range, the
clip acts on rounding noise instead of on policy change.
"""

from __future__ import annotations

import math

import torch

from hrf_fast.distributed import comm
from hrf_fast.noise import NoiseKey, noise_key
from hrf_fast.training.components import Components
from hrf_fast.training.groups import Group
from hrf_fast.training.optimizer_step import replay_ratios, window_share
from hrf_fast.training.rollout import rollout
from hrf_fast.windows.base import Window

# steps to replay: the least that several steps to a call need, and cheap
_STEPS = 2
# under this the fp32 gradients of a step lose digits: latents of size 1 are rounded by 6e-8
_SMALL_STD, _ROUNDING = 1e-3, 6e-8


def self_check(components: Components) -> str:
    """Roll out and replay a few late steps, where std is least and the ratio most sensitive.

    Returns:
        One line for the user: whether replayed log-probs equal the rollout's, the largest |ratio − 1|, the smallest
        clip range, and which implementation of the kernels ran in what precision.
    """
    policy, plan = components.policy, components.call_plan
    stop = policy.sampler.stochastic_steps
    window = Window(max(0, stop - max(_STEPS, plan.steps_per_call)), stop)
    numbers = range(_joined(components))
    pack = [_group(components, number, window) for number in numbers]
    # where only some steps are kept, those that are replayed are the ones to check
    keeps_all = math.isinf(plan.kept_pairs)
    with policy.uncounted():
        result = rollout(policy, pack, plan, keep_from=window.start if keeps_all else None)
        calls = plan.update(result.calls, dict.fromkeys(numbers, window))
        ratios = replay_ratios(policy, result.trajectories, calls, as_in_update=True)
        error = float((ratios - 1).abs().max())
    # one rank's device may round otherwise; all ranks must come to one verdict
    return _verdict(components, window, comm.largest(error), len(numbers) > 1)


def _verdict(components: Components, replayed: Window, error: float, joined: bool) -> str:
    policy, plan, clips = components.policy, components.call_plan, components.algorithm.clips
    steps, stop = len(policy.sampler), policy.sampler.stochastic_steps
    # of a schedule that does not say so, a user's, the last stochastic step
    shortest = getattr(components.schedule, "shortest", Window(stop - 1, stop))
    smallest = clips.clip_range * (window_share(shortest, stop, steps) if clips.scale_by_window else 1.0)
    if clips.range_factors is not None:
        # of the steps whose ratios these are
        smallest *= float(clips.range_factors[replayed.start : replayed.stop].min())
    inside = error < smallest / 10
    if error == 0:
        verdict = "passed: replayed log-probs equal the rollout's exactly"
    elif inside:
        verdict = "passed: replayed log-probs differ from the rollout's by rounding, well inside the clip range"
    else:
        verdict = "failed, training goes on: replayed log-probs differ too much from the rollout's for the clip range"
    line = (
        f"self-check {verdict} (|ratio - 1| {error:.2g}, smallest clip range {smallest:.2g}; "
        f"{policy.kernels} kernels: {policy.kernels_reason}; {policy.precision})"
    )
    if not inside:
        regrouped = not math.isinf(plan.kept_pairs) and (joined or plan.steps_per_call > 1)
        least_clip = 10 * error * clips.clip_range / smallest
        ways_out = [
            "compute.images_per_call=0" if regrouped else "",
            "compute.compile=none" if policy.compiled != "none" else "",
            "compute.precision=fp32" if policy.precision != "fp32" else "",
            f"a train.clip_range of at least {least_clip:.2g}" if math.isfinite(error) else "",
        ]
        if math.isfinite(error):
            line += "; the clip will act on rounding noise"
        else:
            line += "; no gradient will be finite"
            ways_out.append("weights that `hrf sample` draws finite images of")
        line += f": use {' or '.join(filter(None, ways_out))}"
    std = policy.sampler.coefficients.std[:stop]
    if (least_std := float(std.min())) < _SMALL_STD:
        line += (
            f"; step {int(std.argmin())} has noise of std {least_std:.2g} only, where fp32 rounds gradients by "
            f"{_ROUNDING / least_std:.2%}: a larger sample.eta or noise_level has more"
        )
    return line


def _joined(components: Components) -> int:
    """How many groups share calls: as many as a rank rolls out together and as fit into a call."""
    groups = components.groups
    together = min(len(groups.own(steps)) for steps in groups.rounds(components.call_plan.order))
    return max(1, min(components.call_plan.groups_per_call, together))


def _group(components: Components, number: int, window: Window) -> Group:
    policy, groups = components.policy, components.groups
    ids = torch.tensor(groups.sample_ids(number), device=policy.device)
    noise = NoiseKey(noise_key(components.algorithm.seed, 0, "self_check"), ids)
    prompt = components.panel.prompt(number)
    condition = policy.condition([prompt] * groups.size, guided=components.algorithm.guided)
    return Group(number, window, noise, condition, prompt=prompt)
