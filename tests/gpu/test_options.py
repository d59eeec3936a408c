"""Every option about speed trains: a plain run's gradient, within the option's own rounding, and finite weights."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hrf_fast.run.files import read_log
from tests.conftest import tiny_words
from tests.gpu.conftest import train
from tests.runs import weights, with_folder
from tests.text_models import text_model

ROOT = Path(__file__).parents[2]
# words, largest relative difference of the gradient's norm, why not on a CPU
FP32, TF32 = 1e-3, 2e-2
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


@pytest.fixture(scope="module")
def plain(device, tiny_model, tmp_path_factory):
    """The first record of a run without any of the options."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train([*tiny_words(tiny_model, folder), "evaluation.every=0", f"run.device={device}", "train.iterations=1"])
    return read_log(folder / "metrics.jsonl")[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_has_the_plain_run_s_gradient(device, words, plain, tiny_model, tmp_path, name):
    more, tolerance, why = OPTIONS[name]
    if device.type != "cuda" and why:
        pytest.skip(why)
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    train([*words, *more, "train.iterations=1"])
    check(read_log(tmp_path / "run" / "metrics.jsonl")[0], plain, tolerance)
    before, after = weights(tiny_model), weights(tmp_path / "run")
    assert all(value.isfinite().all() for value in after.values())
    assert any(not value.equal(before[key]) for key, value in after.items())


def check(record, plain, tolerance):
    assert record["grad_norm"] == pytest.approx(plain["grad_norm"], rel=tolerance)
    assert record["ratio_max"] == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("stage", [0, 1, 2, 3, "3_offload"])
def test_zero_on_one_device_has_the_plain_run_s_gradient(device, words, plain, tmp_path, stage):
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    if device.type != "cuda" and stage != 2:
        pytest.skip("tests/distributed runs it on CPU ranks")
    name = ["optimizer.name=cpu_adam"] if stage == "3_offload" else []
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    more = [f"engine.deepspeed={ROOT}/configs/deepspeed/zero{stage}.json", "train.iterations=1", *name]
    reward = "reward.name=tests.gpu.conftest:coarse"
    # a process of its own: a process group is for one engine
    command = [sys.executable, "-m", "hrf_fast.cli", "train", *words, *more, reward]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    check(read_log(tmp_path / "run" / "metrics.jsonl")[0], plain, FP32)


def test_encoders_and_decoder_may_wait_on_the_cpu(needs_cuda, device, tmp_path):
    words = [*tiny_words(text_model("sd1"), tmp_path / "run"), "prompts.source=animals", "evaluation.panel_size=8"]
    words += [f"run.device={device}", "evaluation.every=0", "train.iterations=1"]
    for name in ("false", "true"):
        train(with_folder(words, tmp_path / name, f"compute.offload={name}"))
    one, two = (read_log(tmp_path / name / "metrics.jsonl")[0] for name in ("false", "true"))
    check(two, one, FP32)
