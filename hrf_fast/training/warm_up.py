"""Warm-up: make all graphs of a compiled network before training, so that no iteration pays for one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch

from hrf_fast.config.options import Config
from hrf_fast.distributed import comm
from hrf_fast.policies.pixel import Policy


def batch_sizes(config: Config) -> list[int]:
    """A batch for every graph that a run will need: the update's, and one image where a split leaves a single one."""
    train, group, most = config.train, config.train.group_size, config.compute.batch_size
    micro = min(config.samples_per_call, group)
    anchors = train.groups_per_iteration // comm.world_size()
    splits = [(group, micro), (group, most), (anchors, most), (config.evaluation.panel_size, most)]
    single = any(size == 1 or count % size == 1 for count, size in splits)
    return [max(2, micro * config.compute.steps_per_forward), *([1] if single else [])]


def warm_up(policy: Policy, config: Config, note: Callable[[str], None]) -> None:
    """Compile all graphs before training, uncounted and without a gradient left behind.

    Raises:
        ValueError: this model does not compile here.
    """
    if config.compute.compile == "none":
        return
    note(f"torch.compile ({config.compute.compile}) on {policy.device.type}: compiling, which can take minutes")
    began, sizes = time.perf_counter(), batch_sizes(config)
    with comm.agreed(), warnings.catch_warnings():
        # diffusers asks a cached function for torch's version, which torch's compiler finds worth a warning
        warnings.filterwarnings("ignore", message=".*lru_cache")
        try:
            for size in sizes:
                _run(policy, size)
        except torch._dynamo.exc.TorchDynamoException as error:
            # the first paragraph: advice to developers of torch follows
            reason = " ".join(str(error).strip().split("\n\n")[0].split())
            raise ValueError(
                f"compute.compile is {config.compute.compile!r}, but this model does not compile here "
                f"({type(error).__name__}: {reason}); use compute.compile=none"
            ) from error
    for_one = " and batches of one" if 1 in sizes else ""
    note(f"torch.compile: graphs for any batch{for_one} took {time.perf_counter() - began:.1f} s")


def _run(policy: Policy, size: int) -> None:
    """A forward without gradient; a forward and a backward whose gradients are thrown away."""
    # the network itself: model_output would count the calls, and an engine would wait for a step
    latents = torch.zeros(size, *policy.image_shape, device=policy.device)
    timestep = policy.timestep_list[0]
    with torch.no_grad():
        policy.network(latents, timestep)
    weights = [parameter for parameter in policy.unet.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        output = policy.network(latents, timestep)
    torch.autograd.grad(output, weights, torch.ones_like(output), allow_unused=True)
