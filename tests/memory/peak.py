"""Train a UNet of random weights in this process and print what it took, as JSON: bytes over those of an empty trainer.

    python -m tests.memory.peak MODE TINY_MODEL MODEL section.field=value …

`states` is what stays after an optimizer step, `peak` the most that an iteration had; a tiny model runs first, so that
code and libraries are loaded and do not count. Linux only.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from hrf_fast.config import load_config
from hrf_fast.parts import build_parts
from hrf_fast.rollout import rollout, starting_noise
from hrf_fast.seeds import NoiseKey
from hrf_fast.train import learn
from hrf_fast.trajectory import Window


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def iteration(parts, config, mode) -> None:
    policy, train = parts.policy, config.train
    if mode == "keep":
        # all forwards of the window before the first backward
        latents = starting_noise(policy, NoiseKey(seed=0, sample_id=torch.arange(train.group_size)))
        with parts.engine.accumulating():
            outputs = [policy.model_output(latents, step) for step in range(policy.diffusion.stochastic_steps)]
            while outputs:
                parts.engine.backward(outputs.pop().sum())
        parts.engine.step()
        return
    if mode == "checkpoint":
        policy.unet.enable_gradient_checkpointing()
    trajectories, advantages = [], []
    for group in range(train.groups_per_iteration):
        noise = NoiseKey(seed=0, sample_id=torch.arange(train.group_size) + group * train.group_size)
        window = Window(0, policy.diffusion.stochastic_steps)
        start, micro = starting_noise(policy, noise), train.micro_batch_size or train.group_size
        trajectories.append(rollout(policy, window, start, noise, micro_batch_size=micro))
        advantages.append(torch.linspace(-1, 1, train.group_size))
    learn(parts, config, trajectories, advantages)


def main(mode: str, tiny: str, model: str, *words: str) -> None:
    torch.set_num_threads(1)
    warm = load_config([f"model.name={tiny}", *words])
    iteration(build_parts(warm), warm, mode)
    gc.collect()
    empty = status("VmRSS")
    config = load_config([f"model.name={model}", *words])
    parts = build_parts(config)
    iteration(parts, config, mode)
    gc.collect()
    states = status("VmRSS") - empty
    # from here on VmHWM is a new peak
    Path("/proc/self/clear_refs").write_text("5")
    iteration(parts, config, mode)
    print(json.dumps({"states": states, "peak": status("VmHWM") - empty}))


if __name__ == "__main__":
    main(*sys.argv[1:])
