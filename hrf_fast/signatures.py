"""Options that a config gives to a registered factory, read from its signature and docstring."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Argument:
    """One argument of a factory."""

    name: str
    type: str
    default: Any
    required: bool
    doc: str

    def __str__(self) -> str:
        default = "required" if self.required else f"default {self.default!r}"
        return f"{self.name} ({self.type}, {default}): {self.doc}"


def arguments_of(factory: Callable[..., Any], of_the_run: Collection[str]) -> tuple[Argument, ...]:
    """The arguments of a factory less those that the run fills in."""
    docs = _argument_docs(inspect.getdoc(factory) or "")
    return tuple(
        Argument(
            name=name,
            type="" if item.annotation is item.empty else inspect.formatannotation(item.annotation).strip("'"),
            default=None if item.default is item.empty else item.default,
            required=item.default is item.empty,
            doc=docs.get(name, ""),
        )
        for name, item in inspect.signature(factory).parameters.items()
        if name not in of_the_run
    )


def summary(factory: Callable[..., Any]) -> str:
    """The first line of a factory's docstring."""
    return (inspect.getdoc(factory) or "").partition("\n")[0]


def _argument_docs(doc: str) -> dict[str, str]:
    """The `name: text` entries of a docstring's `Args:` section, continuation lines joined."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", doc, re.MULTILINE)
    docs: dict[str, str] = {}
    name = ""
    for line in section.group(1).splitlines() if section else ():
        entry = re.match(r" {4}(\w+): (.*)", line)
        if entry:
            name = entry.group(1)
            docs[name] = entry.group(2)
        elif name and line.strip():
            docs[name] += f" {line.strip()}"
    return docs
