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

from hrf_fast.build import build_parts
from hrf_fast.config.load import load_config
from hrf_fast.noise import NoiseKey
from hrf_fast.policies.sample import starting_noise
from hrf_fast.training.rollout import Start, rollout
from hrf_fast.training.update import Batch, learn
from hrf_fast.windows.base import Window


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def iteration(parts, config) -> None:
    policy, train = parts.policy, config.train
    windows = [Window(0, policy.diffusion.stochastic_steps)] * train.groups_per_iteration
    starts = {}
    for group, window in enumerate(windows):
        noise = NoiseKey(seed=0, sample_id=torch.arange(train.group_size) + group * train.group_size)
        starts[group] = Start(window, starting_noise(policy, noise), noise)
    keep_from = parts.activations.keep_from(dict(enumerate(windows)), train.group_size)
    batch = Batch(*rollout(policy, starts, micro_batch_size=train.group_size, keep_from=keep_from))
    advantages = {group: torch.linspace(-1, 1, train.group_size) for group in starts}
    learn(parts, config, batch, windows, advantages, range(train.groups_per_iteration), iteration=0, note=print)


def main(tiny: str, model: str, *words: str) -> None:
    torch.set_num_threads(1)
    warm = load_config([f"model.name={tiny}", *words])
    iteration(build_parts(warm), warm)
    gc.collect()
    empty = status("VmRSS")
    config = load_config([f"model.name={model}", *words])
    parts = build_parts(config)
    iteration(parts, config)
    gc.collect()
    states = status("VmRSS") - empty
    # from here on VmHWM is a new peak
    Path("/proc/self/clear_refs").write_text("5")
    iteration(parts, config)
    print(json.dumps({"states": states, "peak": status("VmHWM") - empty}))


if __name__ == "__main__":
    main(*sys.argv[1:])
