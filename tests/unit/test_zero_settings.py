"""Settings of DeepSpeed: what is refused by name, what is filled in, and that its own parser takes what we ship."""

from pathlib import Path

import pytest

from hrf_fast.config.load import load_config
from hrf_fast.config.rules import check_job
from hrf_fast.config.zero_settings import complete, read_settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "ds.json.*not valid JSON"),
        ("[1]", "ds.json.*zero_optimization"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage is 4.*0, 1, 2, 3"),
        ('{"zero_optimization": {"stage": "3"}}', "zero_optimization.stage is '3'"),
        (
            '{"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}',
            "zero_optimization.offload_optimizer.* stage 1 or 2 or 3.* stage is 0",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}',
            "zero_optimization.offload_param .*stage 3.* stage is 2",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            "zero_optimization.offload_param.device is 'nvme'.*cpu",
        ),
        (
            '{"zero_optimization": {"stage": 1, "overlap_comm": true}}',
            "zero_optimization.overlap_comm .*stage 2 or 3.* stage is 1",
        ),
        ('{"zero_optimization": {"stage": 0}, "bf16": {"enabled": true}}', "bf16 is .*compute.precision=bf16"),
        ('{"zero_optimization": {"stage": 1}, "train_batch_size": 8}', "train_batch_size is 8.*train.group_size"),
        (
            '{"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}',
            "gradient_clipping is 1.0.*optimizer.max_grad_norm",
        ),
        ('{"zero_optimization": {"stage": 1}, "optimizer": {}}', "optimizer is {}.*optimizer.learning_rate"),
        ('{"zero_optimization": {"stage": 1}, "scheduler": {}}', "scheduler is {}.*optimizer.learning_rate_schedule"),
    ],
)
def test_deepspeed_settings_that_can_not_work_name_themselves(tmp_path, settings, message):
    file = tmp_path / "ds.json"
    file.write_text(settings)
    with pytest.raises(ValueError, match=message):
        check_job(load_config([f"engine.deepspeed={file}"]), 1)


def test_a_deepspeed_file_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="engine.deepspeed is 'zero3'"):
        check_job(load_config(["engine.deepspeed=zero3"]), 1)


def test_auto_in_a_deepspeed_file_leaves_the_value_to_us(tmp_path):
    (tmp_path / "ds.json").write_text('{"train_batch_size": "auto", "zero_optimization": {"stage": 2}}')
    settings = complete(read_settings(str(tmp_path / "ds.json")), max_grad_norm=0.0)
    # clipping that is off is written too: DeepSpeed's default is 1.0
    assert "train_batch_size" not in settings and settings["gradient_clipping"] == 0.0


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "deepspeed").glob("*.json")), ids=lambda file: file.name)
def test_deepspeeds_own_parser_takes_every_shipped_file(file, monkeypatch):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = complete(read_settings(str(file)), max_grad_norm=1.0)
    monkeypatch.setattr("deepspeed.comm.is_initialized", lambda: False)
    parsed = DeepSpeedConfig(settings)
    assert parsed.zero_config.stage == settings["zero_optimization"]["stage"]
    assert parsed.gradient_clipping == (1.0 if parsed.zero_config.stage else 0.0)
