"""Credit: advantages of gathered rewards, of whole samples or of single denoising steps.

A step is credited by the reward of the clean image that the network predicts there: generalized advantage estimation
(Schulman et al., arXiv 1506.02438) without discount. The value of a state x_t is the reward of x̂0, the clean image that
the prediction at x_t stands for, and the rollout has that prediction anyway: with V_i of the state before step i of the
window and V_S the final reward,

    δ_i = V_{i+1} − V_i,   Â_i = δ_i + λ·Â_{i+1}.

Where untrained steps add noise behind the window, they count as one more step: V_S is of the state at its end, the
final reward V_{S+1}.

λ = 1 gives the final reward less V_i, a baseline that depends on the state and leaves the gradient unbiased. A smaller
λ credits a step with what follows it soon: less noise, and as much bias as the values are wrong. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hrf_fast.registry import qualified_name
from hrf_fast.training.advantages import Advantages, Peers, apply_advantages, mix_advantages
from hrf_fast.training.remedies import favour_novel, matching_advantages
from hrf_fast.training.rewarding import GroupRewards
from hrf_fast.user_code import user_code


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


def standardise(
    rewards: Mapping[int, GroupRewards],
    advantages: Advantages,
    device: torch.device,
    *,
    sharpness: float = 0.0,
    gae_lambda: float | None = None,
    term_weights: Mapping[str, float] | None = None,
) -> dict[int, Tensor]:
    """Advantages on `device` by group, [B], or [S, B] where steps have credit of their own.

    A group without rewards has none and is no peer of the others. A sample without peers has none either.

    Args:
        gae_lambda: see `step_advantages`; None credits all steps with the final reward.
        sharpness: of matched trajectories, see `matching_advantages`; 0 leaves advantages as they are.
        term_weights: of reward terms that are standardised one by one, see `mix_advantages`; None standardises the sum.
    """
    finite = _comparable(rewards, advantages)
    if not finite:
        return {}
    if gae_lambda is not None:
        assert isinstance(advantages, Peers), "a rule of the configuration"
        by_step = {}
        for group, scale in advantages.scales(finite).items():
            values = rewards[group].values
            assert values is not None, "the rollout was not asked for the predicted clean images"
            by_step[group] = step_advantages(
                finite[group], values, rewards[group].after, gae_lambda=gae_lambda, scale=scale
            ).to(device)
        return by_step
    prompts = {group: rewards[group].prompt for group in finite}
    if term_weights is None:
        by_group = apply_advantages(advantages, finite, prompts)
    else:
        by_group = mix_advantages(advantages, _by_term(rewards, finite, term_weights), term_weights, prompts)
    for group, values in by_group.items():
        factors, log_prob = rewards[group].novelty, rewards[group].log_prob
        if factors is not None:
            by_group[group] = favour_novel(values, factors)
        if sharpness and log_prob is not None:
            by_group[group] = matching_advantages(values, log_prob, sharpness=sharpness)
    return {group: values.to(device) for group, values in by_group.items()}


def spread_notes(
    rewards: Mapping[int, GroupRewards], advantages: Advantages, term_weights: Mapping[str, float] | None = None
) -> dict[str, str]:
    """Sentences about rewards whose spread is too small to learn from, by kind; arguments as `standardise`.

    Raises:
        UserCodeError: notes() of the user's advantages failed.
    """
    finite, notes = _comparable(rewards, advantages), getattr(advantages, "notes", None)
    if not finite or not notes:
        return {}
    with user_code(f"train.advantages {qualified_name(advantages)}.notes()"):
        if term_weights is None:
            return dict(notes(finite))
        return {
            f"{term}: {kind}": f"reward {term!r}: {sentence}"
            for term, values in _by_term(rewards, finite, term_weights).items()
            for kind, sentence in notes(values).items()
        }


def _by_term(
    rewards: Mapping[int, GroupRewards], groups: Iterable[int], terms: Iterable[str]
) -> dict[str, dict[int, Tensor]]:
    """The rewards [B] of each term by group."""
    return {term: {group: rewards[group].by_term[term] for group in groups} for term in terms}


def _comparable(rewards: Mapping[int, GroupRewards], advantages: Advantages) -> dict[int, Tensor]:
    """Finite rewards by group; none where a batch is down to one sample, which has no spread to standardise by."""
    finite = {group: result.rewards for group, result in rewards.items() if result.rewards is not None}
    alone = sum(len(values) for values in finite.values()) == 1
    return {} if alone and isinstance(advantages, Peers) and advantages.together else finite
