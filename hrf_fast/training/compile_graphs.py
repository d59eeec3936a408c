"""Compile all graphs of a network before training, so that no iteration pays for one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

import torch

from hrf_fast.devices import trial_backward
from hrf_fast.distributed import comm
from hrf_fast.policies.base import Policy
from hrf_fast.prompts import Prompt
from hrf_fast.training.components import Components


def compile_graphs(components: Components, note: Callable[[str], None]) -> None:
    """Compile all graphs that a run needs, uncounted and without a gradient left behind; a no-op without compiling.

    Raises:
        ValueError: this model does not compile here.
    """
    groups, panel = components.groups, components.panel
    if components.policy.compiled != "none":
        # what a rank samples: anchors, groups, its share of a panel
        splits = (groups.per_iteration // groups.ranks, groups.size, -(-panel.size // groups.ranks))
        compile_sizes(
            components.policy,
            components.call_plan.sizes(splits),
            note,
            panel.prompt(0),
            guided=components.algorithm.guided,
            # a weight may begin at 0
            referred=any(components.algorithm.reference(iteration).steps for iteration in (0, 1)),
        )


def compile_sizes(
    policy: Policy,
    sizes: Sequence[int],
    note: Callable[[str], None],
    prompt: Prompt | None = None,
    *,
    guided: bool = True,
    referred: bool = False,
) -> None:
    """Run batches of the given sizes with and without gradient, conditioned on any prompt of the run.

    Args:
        referred: run them through the pretrained network too.

    Raises:
        ValueError: this model does not compile here; on all ranks.
    """
    note(f"torch.compile ({policy.compiled}) on {policy.device.type}: compiling, which can take minutes")
    began = time.perf_counter()
    with comm.agreed(), warnings.catch_warnings():
        # diffusers asks a cached function for torch's version, which torch's compiler finds worth a warning
        warnings.filterwarnings("ignore", message=".*lru_cache")
        try:
            for size in sizes:
                _run(policy, size, prompt, guided)
                if referred:
                    with policy.uncounted():
                        latents = torch.zeros(size, *policy.latent_shape, device=policy.device)
                        policy.reference(latents, 0, policy.condition([prompt] * size, guided=guided))
        except torch._dynamo.exc.TorchDynamoException as error:
            # the first paragraph: advice to developers of torch follows
            reason = " ".join(str(error).strip().split("\n\n")[0].split())
            raise ValueError(
                f"compute.compile is {policy.compiled!r}, but this model does not compile here "
                f"({type(error).__name__}: {reason}); use compute.compile=none"
            ) from error
    for_one = " and batches of one" if 1 in sizes else ""
    note(f"torch.compile: graphs for any batch{for_one} took {time.perf_counter() - began:.1f} s")


def _run(policy: Policy, size: int, prompt: Prompt | None, guided: bool) -> None:
    """Run a forward without gradient, then a forward and a backward whose gradients are thrown away."""
    # the network itself: predict would count the calls, and an engine would wait for a step
    condition = policy.condition([prompt] * size, guided=guided)
    latents = torch.zeros(size * condition.branches, *policy.latent_shape, device=policy.device)
    named, timestep = condition.inputs, policy.sampler.timesteps[0]
    with torch.no_grad():
        policy.network(latents, timestep, **named)
    weights = [parameter for parameter in policy.network.parameters() if parameter.requires_grad]
    trial_backward(lambda: policy.network(latents, timestep, **named), weights)
