"""Failures: an exception of one rank, carried to the others to be raised there too.

An exception object itself can't always be pickled, and a rank that fails to send leaves the others waiting.
"""

from __future__ import annotations

import importlib
import operator
import sys
from typing import Any, NamedTuple


class Packed(NamedTuple):
    """An exception as strings and numbers."""

    kinds: list[tuple[str, str]]
    """Module and name of its type, then of the bases that everybody knows, from the nearest on."""
    name: str
    """Name of its type."""
    message: str
    system: tuple[Any, ...] | None
    """An OSError's errno, strerror, filename and filename2."""


def pack(error: Exception) -> Packed:
    """Everything of an exception that another process can be sent."""
    kind, *bases = type(error).__mro__
    known = [base for base in bases if base.__module__.partition(".")[0] in ("builtins", "hrf_fast")]
    kinds = [(cls.__module__, cls.__qualname__) for cls in (kind, *known) if issubclass(cls, Exception)]
    system = None
    if isinstance(error, OSError):
        system = (error.errno, error.strerror, error.filename, getattr(error, "filename2", None))
    return Packed(kinds, kind.__name__, str(error), system)


def unpack(packed: Packed, rank: int) -> Exception:
    """The exception that rank `rank` has packed, named in the message unless it is the main rank.

    Returns:
        One of its type, or of the nearest base that takes a message, which then begins with the type's name.
    """
    where = f"rank {rank}: " if rank else ""
    for number, (module, name) in enumerate(packed.kinds):
        message = f"{where}{packed.message}" if number == 0 else f"{where}{packed.name}: {packed.message}"
        try:
            kind = operator.attrgetter(name)(sys.modules.get(module) or importlib.import_module(module))
            error = _build(kind, message, where, packed.system)
        # a type of a local function, or a constructor that wants something else, whatever it raises of that
        except Exception:
            continue
        if packed.message in str(error) or packed.system:
            return error
    return RuntimeError(f"{where}{packed.name}: {packed.message}")


def _build(kind: type[Exception], message: str, where: str, system: tuple[Any, ...] | None) -> Exception:
    if system is None or not issubclass(kind, OSError):
        return kind(message)
    number, reason, file, second = system
    if reason is None:
        error = kind(message)
        error.errno = number
        return error
    return kind(number, f"{where}{reason}", file, None, second)
