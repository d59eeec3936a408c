"""Facts of an option: what its value may be, and what a change of it means. Each field carries its own as metadata."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from hrf_fast.registry import nearest


@dataclass(frozen=True)
class Facts:
    """Bounds and choices of a value, and what a change of it means."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    resumable: bool = False
    """Whether a run may resume with another value: what it computes does not depend on the option."""
    panel: bool = False
    """Whether panels can be compared only between runs in which the values are equal."""

    @property
    def rule(self) -> str:
        """The bounds or the choices in words, such as "at least 0 and below 1"; empty where any value will do."""
        if self.choices:
            return ", ".join(self.choices)
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)

    def check(self, option: str, value: Any) -> None:
        """Refuse a value that breaks the rule, or an item of a list that does.

        Raises:
            ValueError: names the option, its value and the rule.
        """
        if value is None:
            return
        if self.choices:
            items, verb = (value, "has") if isinstance(value, list) else ([value], "is")
            for item in items:
                if item not in self.choices:
                    raise ValueError(f"{option} {verb} {item!r}{nearest(item, self.choices)}; use {self.rule}")
        elif self.rule and not self._within_bounds(value):
            raise ValueError(f"{option} is {value}; it must be {self.rule}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{option} is {value}; use a finite number")

    def _within_bounds(self, value: float) -> bool:
        # NaN compares as false, so it is within no bound
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def option(default: Any, **facts: Any) -> Any:
    """A dataclass field with its default and its `Facts`; a list or a mapping is copied for every instance."""
    metadata = {"facts": Facts(**facts)}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
