"""Keys of DeepSpeed's `zero_optimization`: their names, types and ranges, so that a plan needs no DeepSpeed.

A test holds the table equal to DeepSpeed's own classes. A key that only a newer DeepSpeed has is looked up there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hrf_fast.config.facts import Facts
from hrf_fast.registry import nearest


class Key(NamedTuple):
    """A key's type and range, and whether null will do."""

    kind: type
    facts: Facts = Facts()
    null: bool = False


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
_FLAG, _COUNT, _SHARE = Key(bool), Key(int, Facts(at_least=0)), Key(float, Facts(at_least=0, at_most=1))
# of stage 3, each under a long and a short name
_STAGE3_COUNTS = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
)
_STAGE3_FLAGS = ("gather_16bit_weights_on_model_save", "use_all_reduce_for_fetch_params", "allgather_sequential")
_FLAGS = (
    "contiguous_gradients",
    "reduce_scatter",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "compute_grad_norm",
    "load_from_fp32_weights",
    "elastic_checkpoint",
    "ignore_unused_parameters",
    "legacy_stage1",
    "round_robin_gradients",
    "parameter_alignment",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "memory_efficient_linear",
    "pipeline_loading_checkpoint",
    "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "save_muon_momentum_buffer_in_memory",
)
ZERO = {
    "stage": Key(int),
    "reduce_bucket_size": Key(int, Facts(above=0)),
    "allgather_bucket_size": _COUNT,
    "sub_group_size": _COUNT,
    "zero_hpz_partition_size": _COUNT,
    "overlap_comm": Key(bool, null=True),
    **dict.fromkeys(("offload_param", "offload_optimizer", "zenflow"), Key(dict, null=True)),
    "leaf_module": Key(dict),
    **dict.fromkeys(("module_granularity_threshold", "stage3_module_granularity_threshold"), Key(int)),
    **dict.fromkeys((*_STAGE3_COUNTS, *(f"stage3_{name}" for name in _STAGE3_COUNTS)), _COUNT),
    **dict.fromkeys((*_FLAGS, *_STAGE3_FLAGS, *(f"stage3_{name}" for name in _STAGE3_FLAGS)), _FLAG),
}
_OFFLOAD = {"device": Key(str), "nvme_path": Key(str, null=True), "buffer_count": _COUNT, "pin_memory": _FLAG}
OFFLOAD = {
    "offload_param": {**_OFFLOAD, "buffer_size": _COUNT, "max_in_cpu": _COUNT},
    "offload_optimizer": {
        **_OFFLOAD,
        **dict.fromkeys(("pipeline_read", "pipeline_write", "fast_init", "super_offload"), _FLAG),
        **dict.fromkeys(("ratio", "cpuadam_cores_perc"), _SHARE),
    },
}
# DeepSpeed still takes them, but would have the device in another key than we read
OLD = {
    "cpu_offload": '"offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": '"offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": '"pin_memory" in offload_optimizer or offload_param',
    "stage3_gather_fp16_weights_on_model_save": '"stage3_gather_16bit_weights_on_model_save"',
}


def check_keys(zero: dict[str, Any], where: str) -> None:
    """Refuse a key of `zero_optimization` that does not exist, and a value of another type or out of range.

    Args:
        where: option and file, for the message.

    Raises:
        ValueError: names the key, its value, and the nearest name or what it may be.
    """
    for key, value in zero.items():
        if key in OLD:
            raise ValueError(f"{where} zero_optimization.{key} is an old name; write {OLD[key]} instead")
        _check(ZERO, key, value, "zero_optimization", where)
        for name, inner in (value or {}).items() if key in OFFLOAD else ():
            _check(OFFLOAD[key], name, inner, f"zero_optimization.{key}", where)


def _check(keys: dict[str, Key], name: str, value: Any, section: str, where: str) -> None:
    path = f"{section}.{name}"
    if name not in keys:
        if section == "zero_optimization" and _deepspeed_has(name):
            return
        raise ValueError(f"{where} there is no {path}{nearest(name, keys)}; it takes {', '.join(sorted(keys))}")
    key = keys[name]
    if value is None and key.null:
        return
    if not _fits(key.kind, value):
        quotes = ", without quotes" if isinstance(value, str) and key.kind in (bool, int, float) else ""
        raise ValueError(f"{where} {path} is {value!r}; use {_KINDS[key.kind]}{quotes}")
    key.facts.check(f"{where} {path}", value)


def _fits(kind: type, value: Any) -> bool:
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        # JSON has 5e8 as a float
        return kind is float or value == value // 1
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _deepspeed_has(name: str) -> bool:
    """Whether the installed DeepSpeed, which may be newer than this table, has a key; its own check follows then."""
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    except ImportError:
        return False
    fields = DeepSpeedZeroConfig.model_fields
    return name in fields or name in {field.alias for field in fields.values()}
