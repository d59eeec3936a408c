"""Memory traffic without a clock: bytes of sample-sized tensors that the operations of a step read and write."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Count(NamedTuple):
    tensors: float
    """Traffic over the bytes of one float32 tensor of the whole batch."""
    calls: int | None
    """Operations that compute, each a kernel launch on a GPU."""


# what tests/ptx counts when it runs the compiled kernels: the launches of the loss and of its backward. Two-stage reads
# three tensors twice and writes the gradient; one-program reads them once, and multiplies nothing where the upstream
# gradient is 1. A bf16 model output and its gradient are half a tensor each.
TRITON = {
    "fp32": {"two-stage": Count(7.0, 3), "one-program": Count(4.0, 2)},
    "bf16": {"two-stage": Count(5.5, 3), "one-program": Count(3.0, 2)},
}


class Traffic(TorchDispatchMode):
    """Adds up what torch operations read and write; views and allocations cost nothing.

    Every operation is taken to read its inputs from memory and to write its outputs to it: right for a GPU and tensors
    beyond its cache, too much for blocks that stay in a CPU's.
    """

    def __init__(self, sample: int) -> None:
        super().__init__()
        self.sample, self.bytes, self.calls = sample, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        storages = {value.untyped_storage().data_ptr() for value in inputs}
        view = not writes and outputs and all(value.untyped_storage().data_ptr() in storages for value in outputs)
        name = func._schema.name
        if view or "empty" in name or not outputs:
            return result
        self.calls += 1
        self.bytes += sum(map(self._size, outputs))
        # an `out` is not read, nor is what is filled or copied over, nor what only lends its shape
        unread = {id(value) for value in tree_leaves(kwargs.get("out"))}
        if name.endswith(("::copy_", "::fill_", "::zero_")) or name.endswith("_like") or "::new_" in name:
            unread.add(id(inputs[0]))
        self.bytes += sum(self._size(value) for value in inputs if id(value) not in unread)
        return result

    def _size(self, value: Tensor) -> int:
        """Bytes of a tensor at least as large as a sample; one that is expanded has no more than its storage."""
        if value.numel() < self.sample:
            return 0
        size = min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
        return size if size >= self.sample * value.element_size() else 0


def count(run: Callable[[Any], Any], case: Any) -> Count:
    """Traffic of one forward and backward of an eager provider."""
    # made before, so that it is not counted
    _ = case.leaf, case.ones
    with Traffic(case.latents[0].numel()) as traffic:
        run(case)
    return Count(traffic.bytes / (4 * case.latents.numel()), traffic.calls)


def count_analytic(case: Any) -> Count:
    """Traffic of ours: inside its operation, and of autograd around it."""
    from benchmarks.kernel_bench.providers import analytic

    return count(analytic, case)


def count_compiled(run: Callable[[Any], Any], case: Any) -> Count | None:
    """Traffic of the kernels that torch.compile generates at the first call, by its own count, or None."""
    from torch._inductor import compile_fx, config, metrics

    log = compile_fx.inductor_metrics_log
    level = log.level
    # it counts only when it logs, and what comes from a cache it doesn't count
    log.setLevel(logging.INFO)
    metrics.reset()
    try:
        with config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
            run(case)
    finally:
        log.setLevel(level)
    if not metrics.num_bytes_accessed:
        return None
    # on a CPU it counts loops, which are not launches
    kernels = metrics.generated_kernel_count if case.latents.is_cuda else None
    return Count(metrics.num_bytes_accessed / (4 * case.latents.numel()), kernels)
