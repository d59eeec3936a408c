"""Rules of rewards: the one that is trained on, by name or as a sum, and those that only panels measure."""

from __future__ import annotations

from collections import Counter

from hrf_fast.config.options import Config


def check_reward_options(config: Config) -> None:
    """Refuse a reward that is two or none, and a held-out one that is trained on or named twice.

    Raises:
        ValueError: names the option, its value and the way out.
    """
    reward, held_out = config.reward, config.evaluation.rewards
    if bool(reward.name) == bool(reward.terms):
        raise ValueError("set either reward.name or reward.terms (with reward.name=null), not both and not neither")
    if reward.terms and reward.kwargs:
        raise ValueError(
            f"reward.kwargs has {', '.join(reward.kwargs)}, but reward.terms have kwargs of their own; move "
            "them there, or leave it out"
        )
    trained = [(term.name, term.kwargs) for term in reward.terms if term.weight]
    trained += [(reward.name, reward.kwargs)] if reward.name else []
    counts = Counter(held.name for held in held_out)
    for index, held in enumerate(held_out):
        option = f"evaluation.rewards[{index}].name"
        if not held.name:
            raise ValueError(f"{option} is empty; use a name of `hrf rewards`, or module:function of your own")
        if counts[held.name] > 1:
            raise ValueError(
                f"{option} is {held.name!r}, which evaluation.rewards names {counts[held.name]} times, but a panel has "
                "one figure of a name; leave one out, or wrap it in a function of your own, module:function"
            )
        if (held.name, held.kwargs) in trained:
            raise ValueError(
                f"{option} is {held.name!r}, which section reward has with equal arguments, so that nothing of it is "
                "held out; leave it out (evaluation.rewards=[] leaves out all), or name another reward"
            )
