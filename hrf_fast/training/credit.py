"""Credit: advantages of single denoising steps, by the reward of the clean image that the network predicts at each.

Generalized advantage estimation (Schulman et al., arXiv 1506.02438) without discount. The value of a state x_t is the
reward of x̂0, the clean image that the prediction at x_t stands for, and the rollout has that prediction anyway: with
V_i of the state before step i of the window and V_S the final reward,

    δ_i = V_{i+1} − V_i,   Â_i = δ_i + λ·Â_{i+1}.

Where untrained steps add noise behind the window, they count as one more step: V_S is of the state at its end, the
final reward V_{S+1}.

λ = 1 gives the final reward less V_i, a baseline that depends on the state and leaves the gradient unbiased. A smaller
λ credits a step with what follows it soon: less noise, and as much bias as the values are wrong. Pure functions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def step_advantages(
    rewards: Tensor, values: Tensor, after: Tensor | None = None, *, gae_lambda: float, scale: float
) -> Tensor:
    """Advantages of a group's window steps, centred over its samples step by step.

    What all samples gain at a step, such as an estimate that sharpens, is due to no sample's noise: the group's mean
    takes it out.

    Args:
        rewards: [B] final ones; values: [S, B] rewards of x̂0 before each step.
        after: [B] rewards of x̂0 at the window's end, where noise follows; None where none does.
        gae_lambda: λ in [0, 1]; scale: divisor, in units of the reward.

    Returns:
        [S, B] fp32.
    """
    path = torch.cat([values, *([] if after is None else [after[None]]), rewards[None]]).double()
    advantages = path.diff(dim=0)
    for i in range(len(advantages) - 2, -1, -1):
        advantages[i] += gae_lambda * advantages[i + 1]
    advantages = advantages[: len(values)]
    return ((advantages - advantages.mean(1, keepdim=True)) / scale).float()
