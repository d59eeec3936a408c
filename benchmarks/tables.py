"""Markdown tables of the benchmarks, and where pages take them up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hrf_fast.study.statistics import Estimate


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; None is an empty cell, a float has three digits."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    first, *others = (f"| {' | '.join(map(cell, line))} |" for line in (header, *rows))
    return "\n".join((first, "|---" * len(header) + "|", *others))


def with_interval(value: Estimate, spec: str) -> str:
    """A mean and its interval, if there is one, each by a format spec."""
    mean = f"{value.mean:{spec}}"
    return mean if value.low is None else f"{mean} [{value.low:{spec}}, {value.high:{spec}}]"


def find_between(path: Path, markers: tuple[str, str]) -> tuple[int, int]:
    """Find two markers of a file: the characters at which they begin.

    Raises:
        ValueError: there is no such file, or it lacks them.
    """
    if not path.is_file():
        raise ValueError(f"--write is {path}, which is no file; use one with lines {markers[0]!r} and {markers[1]!r}")
    page = path.read_text()
    # a page may name its markers in a sentence
    lines = [re.search(rf"^{re.escape(marker)}$", page, re.MULTILINE) for marker in markers]
    first, last = (line.start() if line else -1 for line in lines)
    if not 0 <= first < last:
        raise ValueError(f"--write is {path}, which has no lines {markers[0]!r} and {markers[1]!r} to write between")
    return first, last


def write_between(path: Path, markers: tuple[str, str], text: str) -> None:
    """Replace what is between two lines of a file.

    Raises:
        ValueError: it has no such lines.
    """
    first, last = find_between(path, markers)
    page = path.read_text()
    path.write_text(f"{page[:first]}{markers[0]}\n{text}\n{page[last:]}")
