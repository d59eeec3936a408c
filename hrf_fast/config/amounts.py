"""Amounts of memory as people write them."""

from __future__ import annotations

import math
import re

_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory(text: str, option: str = "--memory") -> int:
    """Bytes of an amount such as 80GB (10^9 each) or 24GiB (2^30); `option` is named when it is none.

    Raises:
        ValueError: no number, an unknown unit, or nothing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match.group(2).upper() if match else ""
    if match is None or unit not in _UNITS or float(match.group(1)) == 0:
        units = "KB, MB, GB, TB, KiB, MiB, GiB, TiB"
        raise ValueError(f"{option} is {text!r}; use a number above 0 with a unit of {units}, such as 80GB or 24GiB")
    amount = float(match.group(1)) * _UNITS[unit]
    if math.isinf(amount):
        raise ValueError(f"{option} is a number of {len(text)} digits; use an amount that a machine has, such as 80GB")
    return int(amount)


def show_bytes(size: float) -> str:
    """An amount with its unit, in powers of ten."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6)):
        if size >= bytes_:
            return f"{size / bytes_:.3g} {unit}" if size < 1000 * bytes_ else f"{size / bytes_:,.0f} {unit}"
    return f"{size / 1e3:.3g} kB" if size else "0"
