"""States: bytes of weights, gradients and optimizer per GPU, whole or sharded by ZeRO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hrf_fast.config.options import Config
from hrf_fast.config.zero_settings import offload_device, read_settings

ENGINES = (
    "plain",
    "zero1",
    "zero1_offload",
    "zero2",
    "zero2_offload",
    "zero3",
    "zero3_optimizer_offload",
    "zero3_offload",
)
# DeepSpeed's default reduce_bucket_size, in elements
BUCKET = 500_000_000
FP32 = 4


@dataclass(frozen=True)
class States:
    """Bytes per GPU that stay all the time; `step` come and go within an optimizer step, `host` are offloaded."""

    parameters: float
    gradients: float
    optimizer: float
    step: float
    host: float = 0.0

    @property
    def together(self) -> float:
        return self.parameters + self.gradients + self.optimizer


def model_states(
    tensors: Sequence[int],
    *,
    engine: str,
    gpus: int,
    frozen: int = 0,
    optimizer: str = "adamw",
    bucket: int = BUCKET,
    ema: bool = False,
) -> States:
    """Bytes per GPU of weights, the average of the trained ones if there is one, their gradients and AdamW's state.

    ZeRO keeps an fp32 copy of its part of the weights beside the optimizer and a bucket to reduce gradients in; stage 1
    also keeps whole gradients until the step. ZeRO-3 gathers the whole UNet for a rollout and keeps it through a
    backward, as long as it is under DeepSpeed's 10^9 live parameters.

    Args:
        tensors: elements of each trained parameter, which are fp32; frozen: bytes of the others.
        engine: one of ENGINES, where plain is also ZeRO-0 and data parallel.
        bucket: elements that gradients are reduced in at a time, DeepSpeed's reduce_bucket_size.
    """
    total = float(FP32 * sum(tensors))
    if frozen:
        # as weights that are trained: whole on each rank, from stage 3 on the gathered ones and a part
        alone = model_states(tensors, engine=engine, gpus=gpus, optimizer=optimizer, bucket=bucket, ema=ema)
        part = frozen / gpus if engine.startswith("zero3") else 0.0
        if engine == "zero3_offload":
            return replace(alone, parameters=alone.parameters + frozen, host=alone.host + part)
        return replace(alone, parameters=alone.parameters + frozen + part)
    if ema:
        plain = model_states(tensors, engine=engine, gpus=gpus, optimizer=optimizer, bucket=bucket)
        # each rank averages the part of the weights that it holds; offloaded ones on the host
        if engine == "zero3_offload":
            return replace(plain, host=plain.host + total / gpus)
        return replace(plain, parameters=plain.parameters + (total / gpus if engine.startswith("zero3") else total))
    moments = _moments(tensors, optimizer)
    if engine == "plain":
        # several ranks send their gradients as one flat copy; the optimizers of one need no other room
        return States(total, total, moments, total if gpus > 1 else 0.0)
    part, buffers = total / gpus, float(FP32 * bucket)
    gradients = buffers + (total if engine.startswith("zero1") else 0.0)
    if engine.endswith("offload"):
        # the shards of gradients and optimizer live on the host, and those of ZeRO-3's weights if these are offloaded
        shards = 3 * part if engine == "zero3_offload" else 2 * part
        parameters = total + part if engine == "zero3_optimizer_offload" else total
        return States(parameters, gradients, 0.0, 0.0, host=shards + moments / gpus)
    parameters = total + part if engine == "zero3" else total
    return States(parameters, gradients + part, part + moments / gpus, part)


def _moments(tensors: Sequence[int], optimizer: str) -> float:
    if not optimizer.endswith("8bit"):
        return 2.0 * FP32 * sum(tensors)
    # bitsandbytes: two bytes and two fp32 scales per block of 256; tensors under 4096 elements stay in fp32
    return sum(n * (2 + 2 * FP32 / 256) if n >= 4096 else 2.0 * FP32 * n for n in tensors)


def engine_of(config: Config) -> tuple[str, int]:
    """(one of ENGINES, elements of the buckets that gradients are reduced in) of engine.deepspeed."""
    path = config.engine.deepspeed
    if path is None:
        return "plain", BUCKET
    zero = read_settings(path)["zero_optimization"]
    stage = zero.get("stage", 0)
    engine = f"zero{stage}" if stage else "plain"
    if offload_device(zero, "offload_optimizer") != "none":
        # stage 3 leaves its part of the weights on the GPU unless they are offloaded by themselves
        engine += "_optimizer_offload" if stage == 3 and offload_device(zero, "offload_param") == "none" else "_offload"
    # stage 2 fills one while the other is on its way
    buckets = 2 if stage == 2 and zero.get("overlap_comm") else 1
    return engine, buckets * int(zero.get("reduce_bucket_size", BUCKET))
