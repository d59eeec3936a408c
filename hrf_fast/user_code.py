"""User code: rewards, schedules and listeners that are not ours. Errors are named, and global state is put back.

Whatever leaves a block of `user_code` is one kind of error with the file and line of the user's own frame, SystemExit
too: it would end a run as a success. KeyboardInterrupt passes, since a signal can arrive at any line.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from hrf_fast.errors import SIGNALS, UserCodeError

_OURS = ("hrf_fast", "hrf_kernels")
_STANDARD_LIBRARY = str(Path(os.__file__).parent) + os.sep


@contextmanager
def user_code(what: str, error: type[UserCodeError] | None = None) -> Iterator[list[str]]:
    """Run a block that calls user code; yields a list that names, after the block, the global state that was put back.

    Args:
        what: the user code, for messages, such as "reward 'brightness'".
        error: class of what is raised. By default UserCodeError, and what our own code raises when the user's calls it,
            such as a probe, passes as it is.

    Raises:
        UserCodeError: what was called, why it failed, and where.
    """
    before = {name: get() for name, (get, _) in _states().items()}
    changes: list[str] = []
    try:
        yield changes
    except (KeyboardInterrupt, UserCodeError):
        raise
    except BaseException as problem:
        if error is None and _raised_by_us(problem):
            raise
        raise (error or UserCodeError)(f"{what} failed with {error_text(problem)}") from _cause(problem)
    finally:
        changes += _restore(before)


def _cause(problem: BaseException) -> BaseException:
    """The error; a StopIteration as another one, which contextlib takes for the end of its own generator."""
    if not isinstance(problem, StopIteration):
        return problem
    return RuntimeError("StopIteration").with_traceback(problem.__traceback__)


def error_text(problem: BaseException) -> str:
    """An error of user code as its type, its message and, in brackets, its place."""
    message = str(problem)
    if isinstance(problem, SystemExit):
        message = f"sys.exit({message}) would end the run as if it were done; raise an error instead"
    where = _place(problem)
    return type(problem).__name__ + (f": {message}" if message else "") + (f" ({where})" if where else "")


def note_of(what: str, changes: list[str]) -> str:
    """The line that tells a user what was put back."""
    return f"{what} changes {' and '.join(changes)}, which the run puts back: nothing else may depend on it"


def memory_of(thing: Any) -> dict[str, str]:
    """An object's attributes as text, for `forgets`; empty where it has a state."""
    attributes = {} if hasattr(thing, "state") else getattr(thing, "__dict__", {})
    return {name: _text(value) for name, value in attributes.items()}


def _text(value: Any) -> str:
    """An object's repr, which may be a user's own and fail; then nothing, as if it never changed."""
    try:
        return repr(value)
    except Exception:
        return ""


def forgets(what: str, thing: Any, before: dict[str, str], page: str) -> str | None:
    """The line that tells a user that a call has changed what `memory_of` gave before it; None where it hasn't.

    What a call has added is a cache, as of functools.cached_property.
    """
    after = memory_of(thing)
    if all(after.get(name) == value for name, value in before.items()):
        return None
    return (
        f"{what} remembers something and has no state(): a resumed run begins it anew, and may differ from an unbroken "
        f"one; give it state() and load_state(state) ({page})"
    )


def source_of(thing: Any) -> dict[str, str] | None:
    """The file that holds a function, or the class of an object, and its SHA-256; None for ours and what has no source.

    Plain arguments of a partial are in the SHA-256.

    A script or a notebook changes for other reasons, so of those it is the function's or the class's own text.
    """
    bound = ""
    while isinstance(thing, functools.partial) or hasattr(thing, "__wrapped__"):
        if isinstance(thing, functools.partial):
            bound += _plain(thing.args, thing.keywords)
            thing = thing.func
        else:
            thing = thing.__wrapped__
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    module = str(named.__module__)
    file = getattr(sys.modules.get(module), "__file__", None)
    if module.partition(".")[0] in _OURS:
        return None
    try:
        alone = file is None or module == "__main__"
        text = inspect.getsource(named).encode() if alone else Path(str(file)).read_bytes()
    except (OSError, TypeError):
        return None
    return {"file": str(file), "sha256": hashlib.sha256(text + bound.encode()).hexdigest()}


def _plain(arguments: Any, keywords: Any) -> str:
    """Arguments of a partial as JSON; empty without any, or where one is an object, which differs by process."""
    try:
        return json.dumps([arguments, keywords], sort_keys=True) if arguments or keywords else ""
    except (TypeError, ValueError):
        return ""


def source_of_file(path: Path) -> dict[str, str]:
    """A file of the user's as `source_of` gives the file of a function."""
    return {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _raised_by_us(problem: BaseException) -> bool:
    """Whether the innermost frame outside of libraries is one of this package; a TypeError there is about the call."""
    frames = [frame for frame in _frames(problem) if frame.package in _OURS or not frame.in_library]
    return not isinstance(problem, TypeError) and frames[-1].package in _OURS


def _place(problem: BaseException) -> str:
    """The innermost frame of the user's as "file:line in function"; of an installed package, its own innermost one."""
    if isinstance(problem, SyntaxError) and problem.filename:
        return f"{_short(problem.filename)}:{problem.lineno}"
    frames = [
        frame for frame in _frames(problem) if frame.package not in _OURS and not frame.file.startswith("<frozen")
    ]
    if not frames:
        return ""
    outside = [frame for frame in frames if not frame.in_library]
    frame = (outside or [frame for frame in frames if frame.package == frames[0].package])[-1]
    return f"{_short(frame.file)}:{frame.line} in {frame.function}"


def _short(file: str) -> str:
    """A file by its path from the current folder, where it lies below that."""
    return file.removeprefix(f"{_folder()}{os.sep}")


class _Frame(NamedTuple):
    """One frame of a traceback."""

    file: str
    line: int
    function: str
    package: str
    """Top-level package of the module."""

    @property
    def in_library(self) -> bool:
        installed = {"site-packages", "dist-packages"} & {*Path(self.file).parts}
        return bool(installed) or self.file.startswith(("<frozen", _STANDARD_LIBRARY))


def _frames(problem: BaseException) -> list[_Frame]:
    """Frames of an error's traceback, the innermost last."""
    return [
        _Frame(
            frame.f_code.co_filename,
            line,
            frame.f_code.co_name,
            str(frame.f_globals.get("__name__", "")).partition(".")[0],
        )
        for frame, line in traceback.walk_tb(problem.__traceback__)
    ]


def _restore(before: dict[str, Any]) -> list[str]:
    """Put global state back; returns the names of what had changed, less those that a lazy import changes."""
    changed = []
    for name, (get, put) in _states().items():
        # None: the folder was gone, no GPU was in use, or the precision can't be read
        if before[name] is not None and get() != before[name]:
            # a folder that the block has removed can't be gone back to
            with suppress(OSError):
                put(before[name])
            changed.append(name)
    return [name for name in changed if name not in _QUIET]


# imports change the filters, and grad mode is ours: a user need not know
_QUIET = ("Python's warning filters", "torch's grad mode")


@functools.cache
def _states() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """How to read and to write each piece of global state that user code is known to change, by its name."""
    import torch

    cudnn = torch.backends.cudnn

    def flags() -> tuple[bool, ...]:
        return cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32

    def set_flags(values: tuple[bool, ...]) -> None:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = values

    return {
        "the current folder": (_folder, os.chdir),
        "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "torch's default device": (torch.get_default_device, _set_default_device),
        "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
        "torch's grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
        "torch's deterministic mode": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        "torch's matmul precision": (_matmul_precision, torch.set_float32_matmul_precision),
        "cuDNN's flags": (flags, set_flags),
        "the current GPU": (_gpu, torch.cuda.set_device),
        "signal handlers": (_handlers, _set_handlers),
        "Python's warning filters": (lambda: list(warnings.filters), _set_filters),
    }


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None


def _matmul_precision() -> str | None:
    import torch

    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        # set through torch's new API, which the old one can't read
        return None


def _set_default_device(device: Any) -> None:
    import torch

    # the CPU as an explicit default would slow every call down
    torch.set_default_device(None if device.type == "cpu" else device)


def _gpu() -> int | None:
    import torch

    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _handlers() -> tuple[Any, ...]:
    # other threads can't change them
    main = threading.current_thread() is threading.main_thread()
    return tuple(signal.getsignal(number) for number in SIGNALS) if main else ()


def _set_handlers(handlers: tuple[Any, ...]) -> None:
    for number, handler in zip(SIGNALS, handlers, strict=True):
        # None: set by something else than Python, and not for Python to set
        if handler is not None:
            signal.signal(number, handler)


def _set_filters(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    # leaving this block makes Python look at the filters anew
    with warnings.catch_warnings():
        pass
