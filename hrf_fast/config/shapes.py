"""Shapes: whether the names in a layer are options, and its values of their types, said with the whole path.

OmegaConf would say it too, by names of its own classes, and without the path of what lies in a list.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from typing import Any

from hrf_fast.config.options import FACTS, SECTIONS
from hrf_fast.config.renamed import refuse_old_names
from hrf_fast.registry import nearest

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
# YAML's own are bools already; these come from quotes
_TRUTHS = ("true", "false", "yes", "no", "on", "off", "y", "n", "0", "1")


def check_layer(values: Any, source: str) -> None:
    """Refuse what is no option, and a value that its option can't take.

    Args:
        values: a mapping of sections as it was read; source: the file or the word that they come from.

    Raises:
        ValueError: names the source, the whole path, its value, and the nearest name or what belongs there.
    """
    refuse_old_names(values, source)
    for section, options in values.items():
        if section not in SECTIONS:
            raise ValueError(
                f"{source}: no section {section!r}{nearest(str(section), SECTIONS)}; use {', '.join(SECTIONS)}"
            )
        if not isinstance(options, dict):
            raise ValueError(
                f"{source}: {section} is a section, not {_shown(options)}; write {section}.name=value, or leave it out"
            )
        _check_colons(options, section, source)
        _check_fields(SECTIONS[section], options, section, source)


def missing_space(text: str) -> bool:
    """Whether a flow mapping in a line of YAML lacks the space after a colon, as in {a:1}."""
    return re.search(r"[{,]\s*['\"]?[\w.-]+['\"]?:\S", text) is not None


def _check_fields(part: Any, values: dict[Any, Any], path: str, source: str) -> None:
    kinds = typing.get_type_hints(part)
    for name, value in values.items():
        if name not in kinds:
            # the very name in another section is nearer than a like one in this
            there = [f"{section}.{name}" for section, other in SECTIONS.items() if name in typing.get_type_hints(other)]
            hint = f" (did you mean {' or '.join(there)}?)" if there else nearest(str(name), kinds)
            raise ValueError(f"{source}: no option {path}.{name}{hint}; {path} takes {', '.join(kinds)}")
        _check_value(kinds[name], value, f"{path}.{name}", source)


def _check_value(kind: Any, value: Any, path: str, source: str) -> None:
    if value == "???":
        raise ValueError(f"{source}: {path} is ???, which stands for a value that is to be set; set it")
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    # an interpolation is OmegaConf's to resolve
    if (value is None and types.NoneType in kinds) or (isinstance(value, str) and "${" in value):
        return
    (kind,) = (one for one in kinds if one is not types.NoneType)
    if typing.get_origin(kind) is list:
        _check_list(typing.get_args(kind)[0], value, path, source)
    elif typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            way_out = f"it is a mapping: write {path}={{name: value}}, or {path}.name=value"
            raise ValueError(f"{source}: {path} is {_shown(value)}; {way_out}")
    elif dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            names = ", ".join(f"{entry.name}: …" for entry in dataclasses.fields(kind))
            raise ValueError(f"{source}: {path} is {_shown(value)}; write {{{names}}}")
        _check_fields(kind, value, path, source)
    elif not _converts(kind, value):
        rule = FACTS[path].rule if path in FACTS else ""
        wanted = ", ".join(filter(None, (_WORDS[kind], rule)))
        raise ValueError(f"{source}: {path} is {_shown(value)}; use {wanted}")


def _check_list(kind: Any, value: Any, path: str, source: str) -> None:
    # a.b[0].c=1 on the command line
    numbered = isinstance(value, dict) and value and all(str(key).isdecimal() for key in value)
    items = enumerate(value) if isinstance(value, list) else value.items() if numbered else ()
    for number, item in items:
        _check_value(kind, item, f"{path}[{number}]", source)
    if not isinstance(value, list):
        example = "{name: …}, …" if dataclasses.is_dataclass(kind) else "…"
        if isinstance(value, str) and kind is str:
            example = ", ".join(filter(None, (word.strip(" ()[]'\"") for word in value.split(","))))
        wrong = f"one item of {path} can't be set alone" if numbered else f"{path} is {_shown(value)}; it is a list"
        raise ValueError(f"{source}: {wrong}: write {path}=[{example}]")


def _check_colons(value: Any, path: str, source: str) -> None:
    """Refuse {name:value}, which YAML reads as one long name without a value."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            _check_colons(item, f"{path}[{number}]", source)
    for key, inner in value.items() if isinstance(value, dict) else ():
        if inner is None and isinstance(key, str) and ":" in key:
            name, _, rest = key.partition(":")
            raise ValueError(
                f"{source}: {path} has the name {key!r} without a value; YAML wants a space after a colon: "
                f"{{{name}: {rest}}}"
            )
        _check_colons(inner, f"{path}.{key}", source)


def _converts(kind: Any, value: Any) -> bool:
    """Whether OmegaConf makes a `kind` of a value without losing any of it."""
    if isinstance(value, (list, dict)) or value is None:
        return False
    if kind is bool:
        return str(value).lower() in _TRUTHS
    if kind is str:
        return True
    try:
        kind(value)
    except (ValueError, OverflowError):
        return False
    return not isinstance(value, bool) and (kind is float or not isinstance(value, float))


def _shown(value: Any) -> str:
    """A value as one would write it in YAML."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    return repr(value)
