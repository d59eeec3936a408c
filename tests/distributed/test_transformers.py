"""SD3 and FLUX on two ranks against one process: adapters and whole weights, plain and under ZeRO 2 and 3."""

import pytest
import torch

from hrf_fast.assembly.model import build_policy
from hrf_fast.config.load import load_config
from hrf_fast.engines.base import trained_weights
from hrf_fast.train import main
from tests.distributed.ranks import run_cases
from tests.distributed.test_text import ACTIVATIONS, CASES, ENGINES, WEIGHT_TOLERANCE, WEIGHTS, flat, trained
from tests.distributed.test_text import words as text_words
from tests.flow_models import flow_model, size_of
from tests.runs import metrics

RUNS = (
    "flux full zero3 checkpoint",
    "flux lora zero3 replay",
    "sd35 full plain replay",
    "sd35 lora zero2 checkpoint",
    "sd35 full zero3 replay",
    "flux lora plain keep",
)


def words(name, folder):
    kind, weights, engine, activations = name.split()
    return text_words(
        "sd1",
        {"model.name": flow_model(kind), "model.image_size": size_of(kind) or "null", "run.folder": folder},
        {"sample.scheduler": "flow_sde", "sample.guidance_scale": 3.5, "window.schedule": "full"},
        {"train.iterations": 1, "evaluation.panel_size": 2},
        WEIGHTS[weights] | ENGINES[engine] | ACTIVATIONS[activations],
    )


def reference(name):
    """The one-process run that a case must come to."""
    kind, weights, *_ = name.split()
    return f"{kind} {weights} plain replay"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every case on two ranks, and those of one process in this one."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("transformers")
    torch.set_num_threads(1)
    two = {name: ("run", words(name, folder / name.replace(" ", "-"))) for name in RUNS}
    assert not any(run_cases(CASES, two, timeout=1800).values())
    for name in sorted({reference(name) for name in RUNS}):
        assert main(words(name, folder / f"one-{name.replace(' ', '-')}")) == 0
    return folder


# what ranks do with prompts test_text.py has among the quick ones
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_come_to_the_step_of_one_process(folder, name):
    ours, one = folder / name.replace(" ", "-"), folder / f"one-{reference(name).replace(' ', '-')}"
    before = trained_weights(build_policy(load_config(words(reference(name), folder / "unused"))).network)
    start = flat({weight.removeprefix("unet."): value.detach() for weight, value in before.items()})
    whole, two = trained(one, 1), trained(ours, 1)
    change = (whole["checkpoint"] - start).abs().max()
    assert change > 1e-3
    for file, values in whole.items():
        assert float((two[file] - values).abs().max() / change) < WEIGHT_TOLERANCE, file
    (record,), (expected,) = metrics(ours), metrics(one)
    assert record["ratio_max"] == expected["ratio_max"] == 1
    assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
