"""What must hold on a GPU: `make gpu-check` runs it. HRF_GPU_DRY_RUN=1 puts it on the CPU as far as a CPU goes.

Without a GPU and without the variable every test here is skipped.
"""

import os
from pathlib import Path

import pytest
import torch

import hrf_fast
from hrf_fast.run.files import read_log
from tests.conftest import tiny_words
from tests.text_models import text_model

DRY_RUN = os.environ.get("HRF_GPU_DRY_RUN") == "1"
HERE = Path(__file__).parent
# largest relative difference of the gradient's norm in fp32
FP32 = 1e-3
SKIPPED = "torch sees no GPU; `hrf bench gpu --dry-run` runs on the CPU what can run there"


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True, scope="session")
def device():
    """The GPU; the CPU in a dry run."""
    if DRY_RUN:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(SKIPPED)
    return torch.device("cuda", 0)


@pytest.fixture
def needs_cuda(device):
    """Skip in a dry run; a test says by its name what stays unproven."""
    if device.type != "cuda":
        pytest.skip("it is a matter of CUDA")


@pytest.fixture
def words(device, tiny_model, tmp_path):
    """A run of two iterations on the device, whose last panel is the only one."""
    return [*tiny_words(tiny_model, tmp_path / "run"), "evaluation.every=0", f"run.device={device}"]


def model_words(guided, words, device, tmp_path):
    """The fixture's words, or those of a text-to-image run under guidance."""
    guidance = ["sample.guidance_scale=3", "prompts.source=animals", "evaluation.panel_size=8", "evaluation.every=0"]
    return [*tiny_words(text_model("sd1"), tmp_path / "run"), *guidance, f"run.device={device}"] if guided else words


def coarse(images, prompts=None):
    """A reward that the rounding of an image does not move."""
    return (images.mean((1, 2, 3)) * 200).round()


def train(words):
    return hrf_fast.train(hrf_fast.load_config(words), reward=coarse)


@pytest.fixture(scope="module")
def plain(device, tiny_model, tmp_path_factory):
    """The first record of a run without any of the options."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train([*tiny_words(tiny_model, folder), "evaluation.every=0", f"run.device={device}", "train.iterations=1"])
    return read_log(folder / "metrics.jsonl")[0]


def check(record, plain, tolerance):
    """A record has the plain run's gradient, and a ratio of 1, within the tolerance."""
    assert record["grad_norm"] == pytest.approx(plain["grad_norm"], rel=tolerance)
    assert record["ratio_max"] == pytest.approx(1, abs=tolerance)
