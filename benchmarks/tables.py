"""Markdown tables of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; None is an empty cell, a float has three digits."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    first, *others = (f"| {' | '.join(map(cell, line))} |" for line in (header, *rows))
    return "\n".join((first, "|---" * len(header) + "|", *others))
