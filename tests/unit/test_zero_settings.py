"""Settings of DeepSpeed: what is refused by name, what is filled in, and that its own parser takes what we ship."""

import enum
import json
import os
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import pytest
import torch

from hrf_fast.config.facts import Facts
from hrf_fast.config.load import load_config
from hrf_fast.config.rules import check_job
from hrf_fast.config.zero_keys import OFFLOAD, OLD, ZERO, Key
from hrf_fast.config.zero_settings import complete, read_settings
from hrf_fast.memory.zero import BUCKET, engine_of

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
        (
            '{"zero_optimization": {"stage": 2, "reduce_buckt_size": 5}}',
            "zero_optimization.reduce_buckt_size .*'reduce_bucket",
        ),
        (
            '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}}',
            "zero_optimization.reduce_bucket_size is '5e8'; use a whole number, without quotes",
        ),
        (
            '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 2.5}}',
            "zero_optimization.reduce_bucket_size is 2.5; use a whole number$",
        ),
        (
            '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}',
            "zero_optimization.reduce_bucket_size is 0; it must be above 0",
        ),
        (
            '{"zero_optimization": {"stage": 2, "reduce_scatter": "true"}}',
            "zero_optimization.reduce_scatter is 'true'; use true or false, without quotes",
        ),
        (
            '{"zero_optimization": {"stage": 2, "reduce_scatter": 1}}',
            "zero_optimization.reduce_scatter is 1; use true or false$",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}',
            "zero_optimization.offload_optimizer is 'cpu'; use a mapping",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}}',
            "no zero_optimization.offload_param.devise .*'device'",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}',
            "zero_optimization.offload_optimizer.ratio is 0.5: .*no learning rate would reach; remove it",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": true}}}',
            "zero_optimization.offload_optimizer.super_offload is set: .*remove it",
        ),
        (
            '{"zero_optimization": {"stage": 1, "zenflow": {"topk_ratio": 0.1}}}',
            "zero_optimization.zenflow is set.*remove",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 2}}}',
            "zero_optimization.offload_optimizer.ratio is 2; it must be at least 0 and at most 1",
        ),
        (
            '{"zero_optimization": {"stage": 2, "cpu_offload": true}}',
            "zero_optimization.cpu_offload is an old name.*offload_optimizer",
        ),
        (
            '{"zero_optimization": {"stage": 1, "compute_grad_norm": false}}',
            "zero_optimization.compute_grad_norm is false.*remove it",
        ),
        ('{"zero_optimisation": {"stage": 2}}', "there is no zero_optimisation .*'zero_optimization'"),
        ('{"zero_optimization": {"stage": 2}, "steps_per_prints": 5}', "no steps_per_prints .*'steps_per_print'"),
        ('{"zero_optimization": {"stage": "auto"}}', "zero_optimization.stage is 'auto'; use one of 0, 1, 2, 3"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "not valid JSON: the key 'stage' comes twice"),
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


def test_auto_anywhere_in_a_deepspeed_file_is_deepspeeds_default_in_a_plan_and_in_training(tmp_path):
    file = tmp_path / "ds.json"
    for auto, size in (("auto", BUCKET), (5e8, 500_000_000), (7, 7)):
        zero = {"stage": 3, "reduce_bucket_size": auto, "offload_optimizer": {"device": "cpu", "pin_memory": "auto"}}
        file.write_text(json.dumps({"zero_optimization": zero, "steps_per_print": "auto"}))
        assert engine_of(load_config([f"engine.deepspeed={file}"])) == ("zero3_optimizer_offload", size)
    settings = read_settings(str(file))
    assert settings == {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 7, "offload_optimizer": {"device": "cpu"}}
    }


def test_stage_2_has_a_second_bucket_where_communication_overlaps():
    for name, buckets in (("zero2", 1), ("zero2_overlap", 2), ("zero3", 1)):
        config = load_config([f"engine.deepspeed=configs/deepspeed/{name}.json"])
        assert engine_of(config) == (name.removesuffix("_overlap"), buckets * 50_000_000)


def test_a_file_with_the_mark_of_windows_editors_and_with_a_comment_is_read(tmp_path):
    (tmp_path / "ds.json").write_text('{"_comment": "ours", "zero_optimization": {"stage": 2}}', encoding="utf-8-sig")
    assert read_settings(str(tmp_path / "ds.json"))["zero_optimization"] == {"stage": 2}


def test_a_plan_names_what_is_wrong_in_a_deepspeed_file_and_imports_no_deepspeed(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}}')
    code = "import sys; from hrf_fast.config.zero_settings import read_settings\n"
    code += "try: read_settings(sys.argv[1])\nexcept ValueError as error: print(error)\n"
    code += "print('deepspeed' in sys.modules, 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "ds.json")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    assert out == [
        f"engine.deepspeed {tmp_path / 'ds.json'}: zero_optimization.reduce_bucket_size is '5e8'; use a whole number, "
        "without quotes",
        "False False",
    ]


def described(field):
    """Of a field of pydantic: its type, its bounds and whether it may be null, as in our table."""
    import pydantic

    arguments = typing.get_args(field.annotation)
    kind = next((kind for kind in arguments if kind is not type(None)), field.annotation)
    bounds = {"Ge": ("at_least", "ge"), "Gt": ("above", "gt"), "Le": ("at_most", "le")}
    facts = {bounds[type(m).__name__][0]: getattr(m, bounds[type(m).__name__][1]) for m in field.metadata}
    if issubclass(kind, pydantic.BaseModel):
        kind = dict
    elif issubclass(kind, enum.Enum):
        kind = int if issubclass(kind, int) else str
    return Key(str if kind is Path else kind, Facts(**facts), type(None) in arguments)


def test_the_table_of_keys_is_that_of_deepspeeds_own_classes():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    tables = {
        DeepSpeedZeroConfig: ZERO,
        DeepSpeedZeroOffloadOptimizerConfig: OFFLOAD["offload_optimizer"],
        DeepSpeedZeroOffloadParamConfig: OFFLOAD["offload_param"],
    }
    for theirs, ours in tables.items():
        fields = theirs.model_fields
        expected = {
            name: described(field)
            for key, field in fields.items()
            for name in filter(None, (key, field.alias))
            if name not in OLD
        }
        assert ours == expected
    assert set(OLD) <= set(DeepSpeedZeroConfig.model_fields)


def test_a_key_that_only_a_newer_deepspeed_has_is_left_to_it(tmp_path, monkeypatch):
    config = pytest.importorskip("deepspeed.runtime.zero.config")
    monkeypatch.delitem(ZERO, "round_robin_gradients")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2, "round_robin_gradients": true}}')
    assert read_settings(str(tmp_path / "ds.json"))["zero_optimization"]["round_robin_gradients"] is True
    monkeypatch.delattr(config, "DeepSpeedZeroConfig")
    with pytest.raises(ValueError, match="no zero_optimization.round_robin_gradients"):
        read_settings(str(tmp_path / "ds.json"))


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "deepspeed").glob("*.json")), ids=lambda file: file.name)
def test_deepspeeds_own_parser_takes_every_shipped_file(file, monkeypatch):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    settings = complete(read_settings(str(file)), max_grad_norm=1.0)
    monkeypatch.setattr("deepspeed.comm.is_initialized", lambda: False)
    parsed = DeepSpeedConfig(settings)
    assert parsed.zero_config.stage == settings["zero_optimization"]["stage"]
    assert parsed.gradient_clipping == (1.0 if parsed.zero_config.stage else 0.0)
    # a timer that waits for the device before every forward
    assert not parsed.timers_config.enabled


def test_what_deepspeed_refuses_itself_is_one_line_that_names_the_key(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    from hrf_fast.engines.zero_setup import check_settings

    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "comms_logger": {"prof_ops": 3}}')
    monkeypatch.setattr("deepspeed.comm.is_initialized", lambda: False)
    with pytest.raises(
        ValueError, match="^DeepSpeed refuses .*engine.deepspeed: CommsLoggerConfig.prof_ops is 3: [^\n]*$"
    ):
        check_settings(complete(read_settings(str(tmp_path / "ds.json")), max_grad_norm=1.0))


def test_only_the_warnings_about_names_that_are_deepspeeds_to_change_are_ignored():
    from hrf_fast.engines.zero_setup import ignore_old_names

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        ignore_old_names()
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
            warnings.warn(f"`torch.distributed.{name}` is deprecated. Please use another.", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in heard] == [
        "`torch.distributed.all_reduce` is deprecated. Please use another."
    ]


def test_one_process_on_another_gpu_tells_deepspeed_which(monkeypatch):
    pytest.importorskip("deepspeed")
    from hrf_fast.engines import zero_setup

    groups, device = [], torch.device("cuda", 1)
    monkeypatch.setattr(zero_setup.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(zero_setup.dist, "init_process_group", lambda backend, **_: groups.append(backend))
    # as `torchrun --nproc_per_node 1` sets it
    monkeypatch.setenv("LOCAL_RANK", "0")
    zero_setup.import_deepspeed(device)
    assert groups == ["cpu:gloo,cuda:nccl"]
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    with zero_setup.on_device(device):
        assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("1", "1")
    # a second run of the process reads its place in them
    assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("0", "0")
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_RANK")
    monkeypatch.delenv("LOCAL_RANK")
    with zero_setup.on_device(device):
        assert os.environ["LOCAL_RANK"] == "1" and "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ
    assert "LOCAL_RANK" not in os.environ
