"""The pretrained model as a reference under ZeRO-3 on two ranks: a copy on each, or adapters switched off."""

import pytest

from hrf_fast.train import main
from tests.conftest import tiny_words
from tests.distributed.test_jobs import finish, start
from tests.runs import metrics


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 2])
def test_two_ranks_under_zero_3_have_the_numbers_of_one_process(tiny_model, tmp_path, lora):
    pytest.importorskip("deepspeed")
    words = [
        "window.schedule=full", "train.groups_per_step=2", "remedies.kl_weight=10", "remedies.reference_penalty=3",
        f"lora.rank={lora}", "optimizer.learning_rate=1e-3", "evaluation.every=0", "evaluation.panel_size=2",
        "stop.max_drift=0",
    ]  # fmt: skip
    assert main([*tiny_words(tiny_model, tmp_path / "plain"), *words]) == 0
    zero = [*tiny_words(tiny_model, tmp_path / "zero"), *words, "engine.deepspeed=configs/deepspeed/zero3.json"]
    for code, errors in finish(start(tmp_path, zero)):
        assert code == 0, errors
    for one, two in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "zero"), strict=True):
        assert one["forwards"] == two["forwards"]
        for name in ("loss", "grad_norm", "reference_kl"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6)
    assert metrics(tmp_path / "zero")[1]["reference_kl"] > 0
