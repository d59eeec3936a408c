"""Footprint: how many bytes a network's activations take.

For a plan the network runs on fake tensors: shapes, types and lifetimes are real, memory is not, so a model of any size
takes seconds on any machine. At the start of a run the real one does, on three images. Every storage that an operation
makes is counted from its birth to its death. Left out: workspaces of convolution libraries, fragmentation, the CUDA
context (the planner keeps a reserve for them).
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hrf_fast.devices import deterministic_backward
from hrf_fast.policies.base import Condition, Policy
from hrf_fast.policies.component import Component
from hrf_fast.policies.files import ModelFiles
from hrf_fast.policies.network import Network
from hrf_fast.policies.untrained import untrained_condition, untrained_decoder, untrained_network, untrained_shape

Conditions = tuple[Condition, Condition]
"""One prompt's where nothing is trained, and in an update."""


@dataclass(frozen=True)
class Linear:
    """Bytes as a function of the images in a network call: all its layers are linear in them."""

    fixed: float
    per_image: float

    def __call__(self, images: int) -> float:
        return self.fixed + self.per_image * images


@dataclass(frozen=True)
class Footprint:
    """Bytes of one network call besides weights and gradients.

    Attributes:
        sampling: peak of a forward without gradients.
        kept: what the graph of a forward holds on to until its backward.
        update: peak of a forward and its backward.
        tensors: elements of each trained parameter.
        latent_bytes: of one image's latents in fp32; image_bytes: of the decoded image in fp32.
        frozen: elements of all frozen parameters; frozen_bytes: of those; buffer_bytes: of the network's buffers.
        decoding: peak of a call of the decoder, with the decoder where that comes to the device for it.
    """

    sampling: Linear
    kept: Linear
    update: Linear
    tensors: tuple[int, ...]
    latent_bytes: int
    image_bytes: int
    frozen: int = 0
    frozen_bytes: int = 0
    buffer_bytes: int = 0
    decoding: int = 0

    @property
    def parameters(self) -> int:
        return sum(self.tensors) + self.frozen


def measure_model(
    files: ModelFiles,
    *,
    device: str,
    guided: tuple[bool, bool] = (False, False),
    image_size: int | None = None,
    channels_last: bool = False,
    offload: bool = False,
    decoder: Component | None = None,
    prepare: Callable[[nn.Module, str], None] | None = None,
) -> dict[tuple[str, bool], Footprint]:
    """Count a model's activations without its weights, for (precision, with gradient checkpointing).

    Args:
        device: cuda or cpu, whose autocast rules differ.
        guided: whether there is guidance where nothing is trained, and in an update.
        image_size: model.image_size; channels_last, offload: of section compute; decoder: of model.decoder.
        prepare: makes of a denoiser what is trained in a precision: adds adapters.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    footprints: dict[tuple[str, bool], Footprint] = {}
    image = untrained_shape(files, image_size).image
    decoding = decoding_bytes(files, image_size, decoder, offload=offload)
    # what exists by now is not looked through again by the many collections below
    gc.freeze()
    try:
        # fp16 takes as much as bf16
        for precision in ("fp32", "bf16"):
            with torch.device("meta"):
                network, shape = untrained_network(files, image_size)
                if prepare is not None:
                    prepare(network.unet, precision)
            with FakeTensorMode():
                _fill(network)
                if device == "cuda":
                    for module in network.modules():
                        if isinstance(module, nn.LayerNorm):
                            module.register_forward_pre_hook(_cast_as_on_cuda)
                # fake tensors are allocated as the kernels do it, and nothing is launched
                options: dict[str, Any] = {"channels_last": channels_last, "device": device}
                options["kernels"] = "triton" if find_spec("triton") else "eager"
                conditions = untrained_condition(files, 1, guided[0]), untrained_condition(files, 1, guided[1])
                counted = Network(network.unet, precision, call=network.call, **options)
                for checkpointing in (False, True):
                    counted.checkpoint_activations(checkpointing)
                    footprints[precision, checkpointing] = _footprint(counted, shape, conditions, image, decoding)
    finally:
        gc.unfreeze()
    return footprints | {("fp16", checkpointing): footprints["bf16", checkpointing] for checkpointing in (False, True)}


def _fill(network: nn.Module) -> None:
    """Give the meta tensors of a network memory on the CPU, which is fake where this is called."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            module.register_parameter(name, nn.Parameter(memory, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))


def _cast_as_on_cuda(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast a normalisation's input as CUDA's autocast does and the CPU's, which stands in for CUDA's here, does not."""
    return (inputs[0].float(), *inputs[1:])


def measure_running(policy: Policy, *, checkpointing: bool, guided: bool = True) -> Footprint:
    """Like `measure_model`, for a loaded policy in its own precision, on three images; clears its gradients.

    Args:
        guided: whether updates are under the policy's guidance.
    """
    conditions = policy.condition([None]), policy.condition([None], guided=guided)
    policy.network.checkpoint_activations(checkpointing)
    try:
        image, decoding = measure_decoding(policy)
        return _footprint(policy.network, policy.latent_shape, conditions, image, decoding)
    finally:
        policy.network.checkpoint_activations(False)
        for parameter in policy.network.parameters():
            parameter.grad = None


def measure_decoding(policy: Policy) -> tuple[tuple[int, ...], int]:
    """The shape of a decoded image, and `Footprint.decoding` of a loaded policy, on one image."""
    clean = torch.zeros(1, *policy.latent_shape, device=policy.device)
    decoder = policy.decoder
    weights = [*decoder.parameters(), *decoder.buffers()] if decoder is not None else []
    # what comes to the device for its work is there once, whatever the images
    moved = sum(weight.nbytes for weight in weights if weight.device != policy.device)
    with torch.no_grad(), _Live([*policy.network.parameters(), *weights, clean]) as live:
        image = tuple(policy.decode(clean).shape[1:])
        peak = live.restart()
    return image, (peak - moved) * policy.decoded_at_once + moved


def decoding_bytes(files: ModelFiles, image_size: int | None, decoder: Component | None, *, offload: bool) -> int:
    """`Footprint.decoding` of a model's files; 0 of one in pixels."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        built = untrained_decoder(files, image_size, decoder)
    if built is None:
        return 0
    network, shape = built
    with FakeTensorMode(), torch.no_grad():
        _fill(network)
        latents = torch.zeros(shape)
        with _Live([*network.parameters(), *network.buffers(), latents]) as live:
            network.decode(latents)
            peak = live.restart()
    return peak + (sum(weight.nbytes for weight in network.parameters()) if offload else 0)


def _footprint(
    network: nn.Module, shape: tuple[int, ...], conditions: Conditions, image: tuple[int, ...], decoding: int
) -> Footprint:
    # not of 1: some layers copy what they can view when there is one image
    two, three = (_peaks(network, shape, images, *conditions) for images in (2, 3))
    sampling, graph, update = (Linear(3 * a - 2 * b, b - a) for a, b in zip(two, three, strict=True))
    frozen = [p for p in network.parameters() if not p.requires_grad]
    return Footprint(
        sampling,
        graph,
        update,
        tuple(p.numel() for p in network.parameters() if p.requires_grad),
        4 * math.prod(shape),
        4 * math.prod(image),
        sum(p.numel() for p in frozen),
        sum(p.nbytes for p in frozen),
        sum(buffer.nbytes for buffer in network.buffers()),
        decoding,
    )


def _peaks(
    network: nn.Module, shape: tuple[int, ...], images: int, sampled: Condition, trained: Condition
) -> tuple[int, int, int]:
    """Bytes of `sampling`, `kept` and `update` for a number of images, whose calls have their branches as rows."""
    parameters = list(network.parameters())
    learnt = [parameter for parameter in parameters if parameter.requires_grad]
    latents = torch.zeros(2 * images, *shape, device=parameters[0].device)
    rows, trained_rows = latents[: images * sampled.branches], latents[: images * trained.branches]
    gradients = [torch.zeros_like(parameter) for parameter in learnt]
    for parameter, gradient in zip(learnt, gradients, strict=True):
        parameter.grad = gradient

    # as in a rollout, whose calls copy the embeddings of a group's prompt for each of its samples
    sampled, trained = sampled.expand(images), trained.expand(images)
    prepared = [latents, *sampled.tensors, *trained.tensors]
    with _Live([*parameters, *gradients, *network.buffers(), *prepared]) as live:
        with torch.no_grad():
            network(rows, 0, **Condition.join([sampled]).inputs).float()
        sampling = live.restart()
        output = network(trained_rows, 0, **Condition.join([trained]).inputs).float()
        gc.collect()
        graph = live.now
        with deterministic_backward():
            output.sum().backward()
        return sampling, graph, live.peak


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are alive: `now`, and their highest number, `peak`."""

    def __init__(self, not_counted: Sequence[Tensor]) -> None:
        super().__init__()
        self.sizes = {_key(tensor): 0 for tensor in not_counted}
        self.now = self.peak = 0

    def restart(self) -> int:
        """The peak so far; from here on another one is measured."""
        gc.collect()
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and _key(value) not in self.sizes:
                storage = value.untyped_storage()
                self.sizes[_key(value)] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._drop, _key(value))
        return result

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
