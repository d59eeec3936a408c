"""Runs of the tests: their words, and what finished ones have written."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import hrf_fast
from hrf_fast.policies.lora import LORA_WEIGHTS
from hrf_fast.run.checkpoint import list_checkpoints
from hrf_fast.run.files import read_log

# of a line of metrics.jsonl: two runs of equal numbers differ in these
MEASURED = ("seconds", "speed", "peak_memory_bytes")
# before the names of the UNet's weights in a checkpoint
_PREFIX = "unet."


# of a line of metrics.jsonl: what a report reads
REPORTED = {
    "images": 1,
    "evaluations": 1,
    "seconds": {},
    "reward_mean": 1.0,
    "reward_std": 1.0,
    "approx_kl": 0.0,
    "clip_fraction": 0.0,
    "grad_norm": 1.0,
}


def with_folder(words, folder, *more):
    return [word for word in words if not word.startswith("run.folder=")] + [f"run.folder={folder}", *more]


def train(words, **options) -> hrf_fast.RunResult:
    """Train by the Python API; options are a reward, a schedule or listeners."""
    return hrf_fast.train(hrf_fast.load_config(words), **options)


def metrics(run: Path):
    """Lines of metrics.jsonl without times and memory."""
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in read_log(run / "metrics.jsonl")]


def panels(run: Path):
    return read_log(run / "evaluations.jsonl")


def weights(run: Path) -> dict[str, Tensor]:
    """The denoiser of a run's tuned model or of a model's own folder; adapters where a run has saved these alone."""
    folder = run / "model" if (run / "model").is_dir() else run
    if (folder / LORA_WEIGHTS).is_file():
        return load_file(folder / LORA_WEIGHTS)
    part = "transformer" if (folder / "transformer").is_dir() else "unet"
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def checkpoint_weights(checkpoint: Path, file: str = "weights.safetensors") -> dict[str, Tensor]:
    """The trained weights in a checkpoint, or the averaged ones in `file`, under the names of `weights`."""
    tensors = load_file(checkpoint / file)
    assert all(name.startswith(_PREFIX) for name in tensors)
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_equal_training(a: Path, b: Path):
    """Equal metrics but for times and memory, and tuned weights that are equal to the bit."""
    assert metrics(a) == metrics(b)
    assert equal(weights(a), weights(b))


def assert_equal_runs(a: Path, b: Path):
    """Equal training and equal panels."""
    assert_equal_training(a, b)
    assert panels(a) == panels(b)


def assert_equal_checkpoints(a: Path, b: Path):
    """Newest checkpoints that are equal to the bit: weights, optimizer, averages, counters and what is remembered."""
    first, second = (list_checkpoints(run / "checkpoints")[0] for run in (a, b))
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    for name in files:
        if name.endswith(".safetensors"):
            assert equal(load_file(first / name), load_file(second / name)), name
    states = [json.loads((checkpoint / "state.json").read_text()) for checkpoint in (first, second)]
    assert states[0] == states[1], [key for key in states[0] if states[0][key] != states[1].get(key)]


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def scheduled(choose):
    """A factory of a window schedule with anchors that answers `choose(num_groups, probe)`."""

    class Chosen:
        needs_anchors = True

        def __init__(self, *, num_inference_steps, stop):
            pass

        def __call__(self, iteration, num_groups, *, generator, probe):
            return choose(num_groups, probe)

    return Chosen
