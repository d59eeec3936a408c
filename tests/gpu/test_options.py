"""Every option about speed trains: a plain run's gradient, within the option's own rounding, and finite weights."""

from importlib.util import find_spec

import pytest

from hrf_fast.run.files import read_log
from tests.conftest import tiny_words
from tests.gpu.conftest import FP32, check, train
from tests.runs import weights, with_folder
from tests.text_models import text_model

# words, largest relative difference of the gradient's norm, why not on a CPU
TF32 = 2e-2
OPTIONS = {
    "channels_last": (["compute.channels_last=true"], FP32, ""),
    "tf32": (["compute.deterministic=false"], TF32, "TF32 is CUDA's"),
    "compile unet": (["compute.compile=unet"], FP32, "it takes minutes there; tests/unit/test_compilation.py compiles"),
    "compile blocks": (["compute.compile=blocks"], FP32, "it takes minutes there"),
    "xformers": (["compute.attention=xformers"], FP32, "xformers has no CPU operator"),
    "fused_adamw": (["optimizer.name=fused_adamw"], FP32, ""),
    "adamw_8bit": (["optimizer.name=adamw_8bit"], FP32, ""),
    "paged_adamw_8bit": (["optimizer.name=paged_adamw_8bit"], FP32, "paging is CUDA's"),
}
NEEDS = {"xformers": "xformers", "adamw_8bit": "bitsandbytes", "paged_adamw_8bit": "bitsandbytes"}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_has_the_plain_run_s_gradient(device, words, plain, tiny_model, tmp_path, name):
    more, tolerance, why = OPTIONS[name]
    if device.type != "cuda" and why:
        pytest.skip(why)
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    try:
        train([*words, *more, "train.iterations=1"])
    except ValueError as error:
        # a build for another torch, whose operators can't be loaded
        if name != "xformers" or "it does not run here" not in str(error):
            raise
        pytest.skip(str(error))
    check(read_log(tmp_path / "run" / "metrics.jsonl")[0], plain, tolerance)
    before, after = weights(tiny_model), weights(tmp_path / "run")
    assert all(value.isfinite().all() for value in after.values())
    assert any(not value.equal(before[key]) for key, value in after.items())


def test_encoders_and_decoder_may_wait_on_the_cpu(needs_cuda, device, tmp_path):
    words = [*tiny_words(text_model("sd1"), tmp_path / "run"), "prompts.source=animals", "evaluation.panel_size=8"]
    words += [f"run.device={device}", "evaluation.every=0", "train.iterations=1"]
    for name in ("false", "true"):
        train(with_folder(words, tmp_path / name, f"compute.offload={name}"))
    one, two = (read_log(tmp_path / name / "metrics.jsonl")[0] for name in ("false", "true"))
    check(two, one, FP32)
