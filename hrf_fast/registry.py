"""Names for the things that a config chooses (schedules, rewards), and the only place that imports user code.

A name that does not exist answers with the nearest one; an option that does not exist with those that do.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, Generic, TypeVar

from hrf_fast.errors import UserCodeError
from hrf_fast.user_code import error_text, note_of, user_code

T = TypeVar("T")
# of module:function; a module that importlib finds need not be an identifier, as my-rewards
_FORM = re.compile(r"[\w-]+(\.[\w-]+)*:[^\W\d]\w*")
# the page that shows a factory and what it makes, by the option that is handed to `call_factory`
_PAGES = {"window.kwargs": "docs/windows.md", "train.advantages": "docs/remedies.md"}


def nearest(name: str, names: Iterable[str], *, cutoff: float = 0.5) -> str:
    """ " (did you mean 'x'?)" or nothing, to append to an error about `name`; `cutoff` of 1 asks for equality."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Registry(Generic[T]):
    """Named factories of one `kind`, chosen by the config option `option`."""

    def __init__(self, kind: str, option: str) -> None:
        self.kind, self.option = kind, option
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an entry.

        Raises:
            ValueError: the name is taken.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"a {self.kind} named {name!r} is already registered; choose another name")
            self._entries[name] = entry
            return entry

        return add

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> T:
        return self.look_up(name, self.option)

    def look_up(self, name: str, option: str) -> T:
        """The entry of a name that `option` has, which may be another option than the registry's.

        Raises:
            ValueError: there is no such entry.
        """
        if name not in self._entries:
            raise ValueError(
                f"{option} is {name!r}{nearest(name, self._entries)}; "
                f"use one of {', '.join(sorted(self._entries))}, or module:function of your own"
            )
        return self._entries[name]


def check_module(spec: str, option: str) -> None:
    """Refuse a `module:function` whose module, or the package that holds it, is nowhere; nothing is imported.

    Args:
        option: which has the spec, for errors.

    Raises:
        ValueError: malformed, or no such module in the current folder or on PYTHONPATH.
    """
    module, _ = _split(spec, option)
    _look_in_current_folder()
    top = module.partition(".")[0]
    # a module that is loaded already need not have a file
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        raise ValueError(
            f"{option} is {spec!r}, but there is no module {top!r} in the current folder or on PYTHONPATH; name a "
            "module and a function of yours as module:function"
        )


def _split(spec: str, option: str) -> tuple[str, str]:
    """Module and function of a `module:function`.

    Raises:
        ValueError: malformed, or the name of a function that a script handed over, and that nobody can import by it.
    """
    module, _, attribute = spec.partition(":")
    of_script = module == "__main__" and not callable(getattr(sys.modules["__main__"], attribute, None))
    if of_script or "<" in attribute or spec == "functools:partial":
        raise ValueError(
            f"{option} is {spec!r}, which went with the script that trained; put the function into a module and name "
            f"it, as {option}=my_module:my_function"
        )
    if not _FORM.fullmatch(spec):
        raise ValueError(f'{option} is {spec!r}; write "module:function" or "package.module:function"')
    return module, attribute


def load_user_function(spec: str, option: str) -> Callable[..., Any]:
    """Import `module:function`, also from the current folder.

    Raises:
        ValueError: malformed, no such module or attribute, a module that raises when imported, or not callable.
    """
    module_name, attribute = _split(spec, option)
    _look_in_current_folder()
    try:
        with _before_the_run(f"importing {module_name}", UserCodeError):
            module = importlib.import_module(module_name)
    except UserCodeError as error:
        problem = error.__cause__ or error
        if isinstance(problem, ModuleNotFoundError) and f"{module_name}.".startswith(f"{problem.name}."):
            raise ValueError(
                f"{option} is {spec!r} but importing {module_name!r} failed: {problem}; is it on PYTHONPATH?"
            ) from problem
        raise ValueError(
            f"{option} is {spec!r} but importing {module_name!r} raised {error_text(problem)}; correct that module"
        ) from problem
    function = getattr(module, attribute, None)
    if not callable(function):
        callables = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(
            f"{option} is {spec!r} but {module_name} has no callable {attribute!r}{nearest(attribute, callables)}"
        )
    return function


def _look_in_current_folder() -> None:
    """Let modules of the current folder be imported, with every launcher."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


@contextmanager
def _before_the_run(what: str, error: type[UserCodeError] | None = None) -> Iterator[None]:
    """A block of user code that runs before the run's output begins, which what it prints must not be taken for."""
    with redirect_stdout(sys.stderr), user_code(what, error) as changes:
        yield
    if changes:
        warnings.warn(note_of(what, changes), stacklevel=3)


def qualified_name(thing: Any) -> str:
    """module:name of a function, a class or an instance's class."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}:{named.__qualname__}"


def call_factory(
    factory: Callable[..., T], option: str, kwargs: dict[str, Any], *, made: Sequence[str] = (), **given: Any
) -> T:
    """Call `factory(**given, **kwargs)` after checking the user's `kwargs` against its signature.

    Args:
        made: arguments of what the factory makes: one that needs the first of them is no factory.

    Raises:
        ValueError: an option that the factory does not have, or one it needs and did not get.
        UserCodeError: a factory of the user's failed.
    """
    parameters = inspect.signature(factory).parameters
    accepted = {name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD} - set(given)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in kwargs:
        if name not in accepted and (name in given or not open_ended):
            options = ", ".join(sorted(accepted)) or "none"
            raise ValueError(f"{option}.{name} is unknown{nearest(name, accepted)}; it takes {options}")
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.KEYWORD_ONLY,
            parameter.POSITIONAL_OR_KEYWORD,
        )
        if required and name in made[:1]:
            raise ValueError(
                f"{qualified_name(factory)} takes ({', '.join(made)}) itself; name a factory, a function without them "
                f"that returns it ({_PAGES[option]} has an example)"
            )
        if required and name in accepted and name not in kwargs:
            raise ValueError(f"{option}.{name} is missing; this choice needs it")
    with _before_the_run(f"building {qualified_name(factory)}"):
        return factory(**given, **kwargs)


def state_of(thing: Any, key: str, option: str) -> dict[str, Any]:
    """{key: its state, as JSON has it} for a checkpoint, or {} where what `option` names has no state.

    A copy: the object may go on changing what it has returned before the checkpoint is written.

    Raises:
        ValueError: the state is not JSON-able.
        UserCodeError: state() failed.
    """
    if not hasattr(thing, "state"):
        return {}
    with user_code(f"{option} {qualified_name(thing)}.state()"):
        state = thing.state()
    try:
        return {key: json.loads(json.dumps(state))}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{option} {qualified_name(thing)}.state() is no JSON ({error}), so no checkpoint can hold it; return "
            "numbers, words, lists and mappings"
        ) from error


def load_state_of(thing: Any, saved: dict[str, Any], key: str, option: str) -> None:
    """Restore what `state_of` gave; a thing without a state, or a checkpoint without one, changes nothing."""
    if hasattr(thing, "load_state") and key in saved:
        with user_code(f"{option} {qualified_name(thing)}.load_state()"):
            thing.load_state(saved[key])


def check_count(option: str, value: Any) -> None:
    """Refuse what is no whole number of at least 1.

    Raises:
        ValueError: names the option and its value.
    """
    if type(value) is not int or value < 1:
        raise ValueError(f"{option} is {value!r}; use a whole number of at least 1")
