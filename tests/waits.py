"""What makes a host and a GPU wait for each other, counted where there is no GPU, and the loop to count in."""

from contextlib import ExitStack, nullcontext
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hrf_fast.training.collect import begin, collect
from hrf_fast.training.update import update

# operations whose result, or the size of whose result, the host reads
READ = ("_local_scalar_dense", "nonzero", "masked_select", "unique2", "_unique2", "equal")
# what makes a tensor of Python's numbers: on a GPU a copy that the host waits for
MADE = (torch.tensor, torch.as_tensor, torch.from_numpy)


class Reads(TorchDispatchMode):
    """Counts reads by the host; what a kernel of `hrf_kernels` does inside is not seen."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in READ or by_mask:
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts tensors that are made of Python's numbers."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in MADE and not isinstance(args[0], torch.Tensor):
            self.counts[func.__name__] = self.counts.get(func.__name__, 0) + 1
        return func(*args, **(kwargs or {}))


def loop_parts(components):
    """An iteration's rollouts and its update, to be called one after the other."""
    run = SimpleNamespace(phase=lambda name: nullcontext(), note=print, note_once=lambda *_, **__: None)
    windows, groups = begin(components, run, 0)
    steps = range(components.groups.num_steps)
    done = {}

    def roll_out():
        done["rollout"], pending = collect(components, run, list(groups.values()), 0)
        for future in pending:
            future.result()
        return done["rollout"]

    def learn():
        size = components.groups.size
        spread = torch.linspace(-1, 1, size, device=components.policy.device)
        update(components, done["rollout"], windows, dict.fromkeys(groups, spread), steps, iteration=0, note=print)

    return roll_out, learn


def count_waits(components) -> list[dict[str, int]]:
    """Reads and copies of an iteration's rollouts, and of its update."""
    counted = []
    for part in loop_parts(components):
        counts: dict[str, int] = {}
        with ExitStack() as stack:
            stack.enter_context(Copies(counts))
            stack.enter_context(Reads(counts))
            part()
        counted.append(counts)
    return counted
