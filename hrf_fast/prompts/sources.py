"""Sources of prompts: a well-known list by name, a text file, JSON lines, or module:function.

A function is called once, before the run, with prompts.kwargs. A list of texts, mappings or (text, metadata) pairs is
the list to draw from; a single pair (text, metadata) says that it is TRL's prompt_fn, which is called for every group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from hrf_fast.assets import ASSETS, PROMPT_LISTS
from hrf_fast.errors import read_utf8
from hrf_fast.noise import seeded_globals
from hrf_fast.prompts.base import as_prompt
from hrf_fast.prompts.draw import PromptFunction, PromptList, Prompts
from hrf_fast.registry import call_factory, load_user_function, nearest
from hrf_fast.user_code import source_of, source_of_file

LISTS = {name: ASSETS / "prompts" / file for name, file in PROMPT_LISTS.items()}
"""Files of the lists that ship with the package, by name."""
# files whose lines are more than prompts
_NO_LISTS = (".csv", ".tsv", ".yaml", ".yml")


def load_prompts(
    option: str, value: str | None, kwargs: dict[str, Any] | None = None, *, negative: str = ""
) -> tuple[Prompts | None, dict[str, str] | None]:
    """Open a source; None without one.

    Args:
        option, value: the option that names the source, for errors, and what it was set to: a name of LISTS, a file
            (JSON lines where it ends with .jsonl), or module:function.
        kwargs: arguments of the function; a file or a list takes none.
        negative: the negative prompt of prompts that have none of their own.

    Returns:
        The prompts, and the user's file or function as `source_of` gives it.

    Raises:
        ValueError: no such source, one without a prompt or with a wrong one, or weights that are all 0.
        UserCodeError: the function failed.
    """
    if value is None:
        return None, None
    path = LISTS.get(value, Path(value).expanduser())
    if path.is_file():
        if kwargs:
            raise ValueError(
                f"prompts.kwargs has {', '.join(kwargs)}, but {option} is {value!r}, a list without arguments"
            )
        if path.suffix.lower() == ".json":
            raise ValueError(
                f"{option} is {value!r}; write JSON lines (.jsonl), or a text file with a prompt on each line"
            )
        if path.suffix.lower() in _NO_LISTS:
            raise ValueError(
                f"{option} is {value!r}, which holds a table or a tree and no prompts alone; write JSON lines (.jsonl),"
                " or a text file with a prompt on each line"
            )
        items = list(_json_lines(path) if path.suffix.lower() == ".jsonl" else _lines(path))
        return _list(option, value, items, negative), None if value in LISTS else source_of_file(path)
    if ":" not in value:
        raise ValueError(
            f"{option} is {value!r}{nearest(value, LISTS)}: no such file, and not one of {', '.join(LISTS)}; name a "
            "file with a prompt on each line, or module:function"
        )
    function = load_user_function(value, option)
    # an own draw: the first group's must not depend on this one
    with seeded_globals(0, 0, "prompts"):
        answer = call_factory(function, "prompts.kwargs", kwargs or {})
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], str):
        as_prompt(answer, f"{option} {value!r}", negative)
        return PromptFunction(value, option, lambda: function(**(kwargs or {})), negative), source_of(function)
    # a mapping is one prompt, and a set has another order in each process
    if isinstance(answer, (str, bytes, Mapping, Set)) or not hasattr(answer, "__iter__"):
        raise ValueError(f"{option} is {value!r}, which returned {answer!r}; return a list of prompts, or (text, {{}})")
    items = [(item, f"{option} {value!r}, item {number}") for number, item in enumerate(answer)]
    return _list(option, value, items, negative), source_of(function)


def check_prompts(
    takes_prompts: bool, model: str, sources: Mapping[str, str | None], *, negative: str = "", negatable: bool = True
) -> None:
    """Refuse prompts for a model that takes none, and a model without those that it needs.

    Args:
        takes_prompts: whether the model does; model: model.name, for errors.
        sources: the values of the options that name sources, the training's first.
        negative: prompts.negative; negatable: whether the model's guidance has a negative prompt.

    Raises:
        ValueError: names the option, its value and the way out.
    """
    if takes_prompts and sources["prompts.source"] is None:
        raise ValueError(
            f"prompts.source is null, but model.name {model} is conditioned on prompts; name a file with a prompt on "
            f"each line, module:function, or one of {', '.join(LISTS)}"
        )
    for option, value in sources.items() if not takes_prompts else ():
        if value is not None:
            raise ValueError(f"{option} is {value!r}, but model.name {model} takes no prompts; leave it out")
    if negative and not negatable:
        raise ValueError(
            f"prompts.negative is {negative!r}, but model.name {model} has no negative prompts; leave it out"
        )


def _list(option: str, value: str, items: list[tuple[Any, str]], negative: str) -> PromptList:
    if not items:
        raise ValueError(f"{option} is {value!r}, which holds no prompt; give at least one")
    prompts, weights = zip(*(as_prompt(item, where, negative) for item, where in items), strict=True)
    if not any(weights):
        raise ValueError(f"{option} is {value!r}, where every weight is 0; give a prompt a weight above 0")
    return PromptList(value, prompts, weights)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The prompts of a text file with their places; comments and empty lines are none."""
    # a prompt may hold line separators of Unicode, at which splitlines would break it
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip(), f"{path}, line {number}"


def _json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        where = f"{path}, line {number}"
        if line.strip():
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f'{where} is no JSON ({error}); write {{"prompt": "a cat"}} on each line') from error
            yield item, where
