"""Prompts: what text-to-image groups are asked to show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One prompt; the samples of a group share it."""

    text: str
    negative: str = ""
    """Text that guidance leads away from."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """For rewards that read it; JSON-able."""
