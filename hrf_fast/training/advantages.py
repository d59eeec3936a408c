"""Advantages by the name in train.advantages, which says against whom a reward is standardised.

Called with the rewards of all groups on every rank alike, so that what is returned and remembered is equal on all.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hrf_fast.config.options import Config
from hrf_fast.registry import Registry, call_factory, load_user_function, qualified_name
from hrf_fast.training.standardising import group_advantages, spreads, weak_spreads, within_band
from hrf_fast.user_code import user_code


class Advantages(Protocol):
    """Turns rewards into advantages; one with `state()` and `load_state(state)`, JSON-able, remembers over a resume.

    `notes(rewards)`, where there is one, gives sentences by kind about rewards that teach little.
    """

    def __call__(self, rewards: Mapping[int, Tensor], prompts: Mapping[int, str]) -> Mapping[int, Tensor]:
        """Advantages [B] by group.

        Args:
            rewards: [B] fp32 or fp64 on the CPU by group in ascending order; prompts: by group, "" without one.
        """
        ...


Factory = Callable[..., Advantages]
# options of advantages, and the estimators that read them; others must leave the default
_READERS = {
    "train.advantage_scale": "group, batch or prompt",
    "train.advantage_baseline": "group or batch",
    "train.advantage_floor": "group or batch",
    "train.prompt_buffer": "prompt",
    "train.prompt_min_count": "prompt",
    "remedies.reward_band": "group or batch",
}
ADVANTAGES: Registry[Factory] = Registry("advantage estimator", "train.advantages")
register_advantages = ADVANTAGES.register


def build_advantages(name: str, **options: Any) -> Advantages:
    """Build what train.advantages names.

    Args:
        name: a registered name, or `module:function` that names a factory.
        options: of the train section, and reward_band; a factory gets those that its arguments name.

    Raises:
        ValueError: an unknown name, a factory that wants something else or makes something else, or an option that it
            has no use for.
    """
    factory = load_user_function(name, "train.advantages") if ":" in name else ADVANTAGES[name]
    wanted = {key: value for key, value in options.items() if key in inspect.signature(factory).parameters}
    defaults = Config()
    for option, readers in _READERS.items():
        section, key = option.split(".")
        neutral = getattr(getattr(defaults, section), key)
        if options.get(key, neutral) != neutral and key not in wanted:
            raise ValueError(
                f"{option} is {options[key]} but train.advantages is {name}, which has no argument {key}; use "
                f"{neutral}, or train.advantages={readers}"
            )
    advantages = call_factory(factory, "train.advantages", {}, made=("rewards", "prompts"), **wanted)
    if not callable(advantages) or hasattr(advantages, "state") != hasattr(advantages, "load_state"):
        raise ValueError(
            f"train.advantages {name} must return a callable (rewards, prompts), with both state() and "
            "load_state(state) or neither"
        )
    return advantages


def apply_advantages(
    advantages: Advantages, rewards: Mapping[int, Tensor], prompts: Mapping[int, str]
) -> dict[int, Tensor]:
    """Call it, and refuse what a user's may have returned.

    Raises:
        ValueError: not [B] finite numbers for every group.
        UserCodeError: it failed.
    """
    what = f"train.advantages {qualified_name(advantages)}"
    with user_code(what):
        # it may write into its rewards
        answer = advantages({group: values.clone() for group, values in rewards.items()}, prompts)
    if not isinstance(answer, Mapping) or answer.keys() != rewards.keys():
        raise ValueError(f"{what} returned {answer!r}; return the advantages of groups {list(rewards)} by group")
    for group, values in answer.items():
        # written so that NaN fails
        if not (isinstance(values, Tensor) and values.shape == rewards[group].shape and bool(values.isfinite().all())):
            raise ValueError(
                f"{what} returned {values!r} for group {group}; return a tensor of {len(rewards[group])} finite numbers"
            )
    return {group: values.detach().float() for group, values in answer.items()}


def mix_advantages(
    advantages: Advantages,
    by_term: Mapping[str, Mapping[int, Tensor]],
    weights: Mapping[str, float],
    prompts: Mapping[int, str],
) -> dict[int, Tensor]:
    """Standardise each reward term on its own and sum the advantages: A = Σ_k w_k·(r_k − mean_k)/max(std_k, floor).

    MixGRPO (arXiv 2507.21802) and GDPO (arXiv 2601.05242) do so, the first with weights of sum 1; the second
    standardises the sum again, over the batch.

    Args:
        by_term: [B] by group of each term that has a weight.

    Raises:
        ValueError, UserCodeError: see `apply_advantages`.
    """
    parts = [(weight, apply_advantages(advantages, by_term[term], prompts)) for term, weight in weights.items()]
    return {group: torch.stack([weight * part[group] for weight, part in parts]).sum(0) for group in prompts}


class Peers:
    """Standardised against the group, or against all groups together."""

    def __init__(self, floor: float, scale: str, baseline: str, band: float, *, together: bool) -> None:
        self._floor, self._scale, self._baseline, self._band = floor, scale, baseline, band
        self.together = together

    def __call__(self, rewards: Mapping[int, Tensor], prompts: Mapping[int, str]) -> dict[int, Tensor]:
        sizes = [len(values) for values in rewards.values()]
        values, peers = self._with_peers(rewards)
        if self._band:
            values = within_band(values, peers, band=self._band)
        advantages = group_advantages(values, peers, floor=self._floor, scale=self._scale, baseline=self._baseline)
        return dict(zip(rewards, advantages.split(sizes), strict=True))

    def scales(self, rewards: Mapping[int, Tensor]) -> dict[int, float]:
        """The divisor of each group's advantages, in units of the reward: 1 without one, infinite for a std of 0.

        What steps changed on the way to equal rewards was undone: a floor would blow it up to full size.
        """
        if self._scale == "none":
            return dict.fromkeys(rewards, 1.0)
        stds = spreads(*self._with_divisor(rewards))
        scales = stds.clamp(min=self._floor).where(stds > 0, torch.inf).tolist()
        return dict.fromkeys(rewards, scales[0]) if len(scales) == 1 else dict(zip(rewards, scales, strict=True))

    def notes(self, rewards: Mapping[int, Tensor]) -> dict[str, str]:
        # without a division there is no floor to be under
        return weak_spreads(*self._with_divisor(rewards), floor=0.0 if self._scale == "none" else self._floor)

    def _with_divisor(self, rewards: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """All rewards [B], and [B] int64 that is equal where one spread divides."""
        values, peers = self._with_peers(rewards)
        return values, torch.zeros_like(peers) if self._scale == "batch" else peers

    def _with_peers(self, rewards: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """All rewards [B], and [B] int64 that is equal for peers."""
        sizes = torch.tensor([len(values) for values in rewards.values()])
        index = torch.arange(len(rewards)).repeat_interleave(sizes)
        return torch.cat(list(rewards.values())), torch.zeros_like(index) if self.together else index


@register_advantages("group")
def group(
    *, advantage_floor: float, advantage_scale: str = "std", advantage_baseline: str = "mean", reward_band: float = 0.0
) -> Advantages:
    """Against the group, as HRF does (arXiv 2410.08315)."""
    return Peers(advantage_floor, advantage_scale, advantage_baseline, reward_band, together=False)


@register_advantages("batch")
def batch(
    *, advantage_floor: float, advantage_scale: str = "std", advantage_baseline: str = "mean", reward_band: float = 0.0
) -> Advantages:
    """Against all groups of the iteration, as DDPO does without statistics (arXiv 2305.13301)."""
    return Peers(advantage_floor, advantage_scale, advantage_baseline, reward_band, together=True)


@register_advantages("prompt")
class PromptStatistics:
    """Against the last rewards of the same prompt, over iterations, as ddpo-pytorch's PerPromptStatTracker.

    An iteration's rewards enter the buffers before the statistics are taken. (reward − mean)/(std + 1e-6) with the
    population std, of the prompt's buffer; of the iteration where the buffer holds fewer than `prompt_min_count`.
    """

    def __init__(self, *, prompt_buffer: int, prompt_min_count: int, advantage_scale: str = "std") -> None:
        self._size, self._min_count, self._scale = prompt_buffer, prompt_min_count, advantage_scale
        self._buffers: dict[str, deque[float]] = {}

    def __call__(self, rewards: Mapping[int, Tensor], prompts: Mapping[int, str]) -> dict[int, Tensor]:
        for number, values in rewards.items():
            self._buffers.setdefault(prompts[number], deque(maxlen=self._size)).extend(values.tolist())
        iteration = torch.cat(list(rewards.values())).double()
        advantages = {}
        for number, values in rewards.items():
            buffer = self._buffers[prompts[number]]
            peers = iteration if len(buffer) < self._min_count else torch.tensor(buffer, dtype=torch.float64)
            std = peers.std(correction=0) + 1e-6 if self._scale == "std" else 1.0
            advantages[number] = ((values.double() - peers.mean()) / std).float()
        return advantages

    def state(self) -> dict[str, list[float]]:
        """The buffers by prompt, the oldest reward first."""
        return {text: list(buffer) for text, buffer in self._buffers.items()}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Restore what `state` gave."""
        self._buffers = {text: deque(values, maxlen=self._size) for text, values in state.items()}
