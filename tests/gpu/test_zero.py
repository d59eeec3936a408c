"""ZeRO on one device, every stage and offload: a plain run's gradient."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hrf_fast.run.files import read_log
from tests.gpu.conftest import FP32, check

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stage", [0, 1, 2, 3, "2_offload", "3_offload"])
def test_zero_on_one_device_has_the_plain_run_s_gradient(device, words, plain, tmp_path, stage):
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    if device.type != "cuda" and stage != 2:
        pytest.skip("tests/distributed runs it on CPU ranks")
    name = ["optimizer.name=cpu_adam"] if str(stage).endswith("offload") else []
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    more = [f"engine.deepspeed={ROOT}/configs/deepspeed/zero{stage}.json", "train.iterations=1", *name]
    reward = "reward.name=tests.gpu.conftest:coarse"
    # a process of its own: a process group is for one engine
    command = [sys.executable, "-m", "hrf_fast.cli", "train", *words, *more, reward]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    # a report keeps the beginning of a message, and a traceback says at its end what failed
    assert done.returncode == 0, done.stderr[-400:]
    check(read_log(tmp_path / "run" / "metrics.jsonl")[0], plain, FP32)
