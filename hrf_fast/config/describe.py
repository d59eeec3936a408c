"""Description of every option: for `hrf train --help`, and for docs/options.md, which this module writes when it runs.

`python -m hrf_fast.config.describe > docs/options.md`
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from hrf_fast.config.facts import Facts
from hrf_fast.config.options import FACTS, SECTIONS

_HEAD = """# Options

Written by `python -m hrf_fast.config.describe > docs/options.md`; a test holds this file fresh. Do not edit it.

Set an option on the command line as `section.option=value`, or in a YAML file that `--config` names. A run resumes only
with the options that it began with, but for those that may change. Runs are compared only where the options that change
the panel are equal.

Later layers go over earlier ones, option by option: the defaults, each `--config` in its order, then all words of the
command line as one layer. A file may name others to start from, `base: other.yaml` or a list, relative to itself.
Lists are taken whole; `kwargs` are merged key by key, cleared by `{}`, and begin empty with another schedule, reward or
source.
"""
_ENVIRONMENT = {
    "HRF_KERNELS": "for debugging, the implementation of log-probs, their gradients, and group norms where channels "
    "come last on CUDA: triton (fused), eager (plain torch), or auto, which is triton on a GPU that has it.",
    "HRF_TRACEBACK": "1 shows the traceback of an error.",
}


_TRUTHS = ("true", "false")


@dataclass(frozen=True)
class Description:
    """One option as people read it."""

    name: str
    """`section.option`."""
    type: str
    default: str
    facts: Facts
    doc: str


def describe_options() -> str:
    """Every option with its default, type, range and docstring, as plain text."""
    lines = []
    for section, factory in SECTIONS.items():
        lines.append(f"\n{section}: {factory.__doc__}")
        for entry in _descriptions(section):
            rule = f"one of {entry.facts.rule}" if entry.facts.choices else entry.facts.rule
            facts = ", ".join(filter(None, (entry.type, rule, _change(entry.facts))))
            lines.append(f"  {entry.name}={entry.default}  ({facts})")
            lines += textwrap.wrap(
                entry.doc, 100, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
            )
    lines += ["\nEnvironment variables:", *(f"  {name}: {doc}" for name, doc in _ENVIRONMENT.items())]
    return "\n".join(lines)


def completions(prefix: str) -> list[str]:
    """Words that may follow in a shell: `section.option=`, or `section.option=choice` after the equals sign."""
    name, equals, _ = prefix.partition("=")
    if not equals:
        words = [f"{option}=" for option in FACTS]
    else:
        values = {**{option: facts.choices for option, facts in FACTS.items()}, **dict.fromkeys(_switches(), _TRUTHS)}
        words = [f"{name}={value}" for value in values.get(name, ())]
    return [word for word in words if word.startswith(prefix)]


def _switches() -> list[str]:
    """Options that are true or false."""
    kinds = {f"{section}.{entry.name}": entry.type for section, part in SECTIONS.items() for entry in fields(part)}
    return [option for option, kind in kinds.items() if kind == "bool"]


def options_page() -> str:
    """docs/options.md: a table for every section."""
    lines = [_HEAD]
    for section, factory in SECTIONS.items():
        lines += [f"## {section}", "", factory.__doc__, ""]
        lines += ["| Option | Type | Default | Range | Meaning | Change |", "|---|---|---|---|---|---|"]
        for entry in _descriptions(section):
            code = [f"`{entry.name}`", entry.type, f"`{entry.default}`"]
            # a bar inside a cell would end it
            cells = [cell.replace("|", r"\|") for cell in (*code, entry.facts.rule, entry.doc, _change(entry.facts))]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Environment variables", "", *(f"- `{name}`: {doc}" for name, doc in _ENVIRONMENT.items()), ""]
    return "\n".join(lines)


def _descriptions(section: str) -> Iterator[Description]:
    factory = SECTIONS[section]
    docs, defaults = _docstrings(factory), factory()
    for entry in fields(factory):
        name = f"{section}.{entry.name}"
        default = _as_written(getattr(defaults, entry.name))
        yield Description(name, str(entry.type).replace("| None", "or null"), default, FACTS[name], docs[entry.name])


def _docstrings(factory: Any) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line; Python itself drops them."""
    (tree,) = ast.parse(inspect.getsource(factory)).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for node, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(text, ast.Expr):
            docs[node.target.id] = " ".join(ast.literal_eval(text.value).split())
    return docs


def _as_written(default: Any) -> str:
    """A default as one would write it on the command line."""
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default)


def _change(facts: Facts) -> str:
    """The consequence of a change of the option."""
    meanings = {"may change on resume": facts.resumable, "changes the panel": facts.panel}
    return ", ".join(meaning for meaning, holds in meanings.items() if holds)


if __name__ == "__main__":
    print(options_page(), end="")
