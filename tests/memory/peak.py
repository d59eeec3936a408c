"""Train a UNet of random weights in this process and print what it took, as JSON: bytes over those of an empty trainer.

    python -m tests.memory.peak TINY_MODEL MODEL section.field=value …

`states` is what stays after an optimizer step, `peak` the most that an iteration had; a tiny model runs first, so that
code and libraries are loaded and do not count. Linux only.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from hrf_fast.assembly.components import build_components
from hrf_fast.config.load import load_config
from hrf_fast.noise import NoiseKey
from hrf_fast.training.components import Components
from hrf_fast.training.groups import Group
from hrf_fast.training.rollout import Rollout, rollout
from hrf_fast.training.update import update
from hrf_fast.windows.base import Window


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def iteration(components: Components) -> None:
    policy, groups, plan = components.policy, components.groups, components.call_plan
    windows = [Window(0, policy.sampler.stochastic_steps)] * groups.per_iteration
    keep_from = plan.keep_from(windows)
    rolled_out, condition = Rollout(), policy.condition([None] * groups.size)
    for number in groups.own():
        noise = NoiseKey(key=0, sample_id=torch.tensor(groups.sample_ids(number)))
        group = Group(number, windows[number], noise, condition)
        rolled_out.join(rollout(policy, [group], plan, keep_from=keep_from))
    advantages = {number: torch.linspace(-1, 1, groups.size) for number in groups.own()}
    update(components, rolled_out, windows, advantages, range(groups.num_steps), iteration=0, note=print)


def main(tiny: str, model: str, *words: str) -> None:
    torch.set_num_threads(1)
    _, warm = build_components(load_config([f"model.name={tiny}", *words]))
    iteration(warm)
    del warm
    gc.collect()
    empty = status("VmRSS")
    _, components = build_components(load_config([f"model.name={model}", *words]))
    iteration(components)
    gc.collect()
    states = status("VmRSS") - empty
    # from here on VmHWM is a new peak
    Path("/proc/self/clear_refs").write_text("5")
    iteration(components)
    print(json.dumps({"states": states, "peak": status("VmHWM") - empty}))


if __name__ == "__main__":
    main(*sys.argv[1:])
