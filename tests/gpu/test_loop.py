"""The loop waits for the device at no denoising step, and takes the memory that `hrf plan` says."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.training_bench.models import make_model
from hrf_fast.assembly.components import build_components
from hrf_fast.config.load import load_config
from hrf_fast.memory.planner import plan
from tests.gpu.conftest import model_words
from tests.waits import loop_parts

STEPS = (4, 8)


# all groups of `loop_parts` make one step
KEEP = ["train.order=on_policy", "compute.activations=keep", "train.groups_per_step=2"]


@pytest.mark.parametrize("guided", [False, True], ids=["unconditional", "guided"])
@pytest.mark.parametrize(
    "more", [[], ["compute.images_per_call=6"], KEEP], ids=["published", "several steps a call", "on_policy keep"]
)
def test_no_denoising_step_waits_for_the_device(needs_cuda, device, words, tmp_path, more, guided):
    # tests/unit/test_waits.py counts on a CPU what this asks the driver
    def waits(steps):
        model = model_words(guided, words, device, tmp_path)
        config = load_config([*model, *more, "window.schedule=full", f"sample.num_inference_steps={steps}"])
        parts, counted = loop_parts(build_components(config)[1]), []
        for part in parts:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    part()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            counted.append(sum("synchronizing" in str(warning.message) for warning in seen))
        return counted

    # once before: what is made at the first use waits
    waits(STEPS[0])
    assert waits(STEPS[0]) == waits(STEPS[1])


class Workspaces(TorchDispatchMode):
    """The most memory of the device that an operation takes for itself, beyond its results."""

    def __init__(self, device):
        super().__init__()
        self.device, self.largest = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        torch.cuda.reset_peak_memory_stats(self.device)
        result = func(*args, **(kwargs or {}))
        taken = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        self.largest = max(self.largest, taken)
        return result


@pytest.mark.parametrize("activations", ["keep", "replay", "checkpoint"])
def test_peak_memory_is_within_a_tenth_of_the_plan(needs_cuda, device, words, tmp_path, activations):
    model = make_model("cifar", tmp_path, seed=0)
    given = [*words, f"model.name={model}", "window.schedule=full", *KEEP, "train.group_size=8"]
    # without a number the plan counts the 64 images of a panel's call, and there is none here
    config = load_config([*given, f"compute.activations={activations}", "compute.images_per_call=8"])
    planned = plan(config, gpus=1, memory=10**18).need("plain", "fp32", activations, 8)
    components = build_components(config)[1]
    # the optimizer's state comes with the first step
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(device)
        for part in loop_parts(components):
            part()
    measured = torch.cuda.max_memory_allocated(device)
    # cuDNN's choice, which no plan knows: exact convolutions of this model took more than a gigabyte on an H100
    with Workspaces(device) as workspaces:
        for part in loop_parts(components):
            part()
    assert 0.9 * planned <= measured <= 1.1 * (planned + workspaces.largest), (planned, measured, workspaces.largest)
