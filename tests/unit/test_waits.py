"""No denoising step makes the host wait for the device: reads and copies of an iteration do not grow with T."""

import pytest
import torch

from hrf_fast.assembly.components import build_components
from hrf_fast.config.load import load_config
from hrf_fast.windows.base import Window
from tests.conftest import tiny_words
from tests.runs import scheduled
from tests.text_models import text_model
from tests.waits import Copies, Reads, count_waits

pytestmark = pytest.mark.long

JOINED = ["compute.images_per_call=6", "train.groups_per_step=2"]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["train.order=on_policy", "compute.activations=keep", *JOINED],
        # several steps of a group share a call
        JOINED,
        ["model=sd1", "sample.guidance_scale=3"],
    ],
    ids=["published", "keep joined", "replay joined", "guided"],
)
def test_waits_do_not_grow_with_the_steps(tiny_model, tmp_path, monkeypatch, words):
    # both look at tensors of a CPU only
    monkeypatch.setattr("hrf_kernels.ops.check_noise", lambda std: None)
    monkeypatch.setattr("hrf_kernels.eager.scale_gradients", lambda gradients, upstream: None)

    def waits(steps):
        model = text_model("sd1") if "model=sd1" in words else tiny_model
        prompts = ["prompts.source=animals", "evaluation.panel_size=8"] if "model=sd1" in words else []
        given = [word for word in words if word != "model=sd1"]
        words_of = [*tiny_words(model, tmp_path), *prompts, *given, f"sample.num_inference_steps={steps}"]
        # two windows that join at the second step, so that rows of a call have different scales
        stop = steps if prompts else steps - 1
        schedule = scheduled(lambda groups, probe: [Window(0, stop), Window(1, stop)])
        return count_waits(build_components(load_config(words_of), schedule=schedule)[1])

    assert waits(3) == waits(5)


def test_the_counters_count():
    counts = {}
    with Copies(counts), Reads(counts):
        value = torch.tensor([1.0, 2.0])
        assert value[0].item() == 1 and bool(value.any()) and len(value[value > 1]) == 1
    assert counts == {"tensor": 1, "_local_scalar_dense": 2, "index": 1}
