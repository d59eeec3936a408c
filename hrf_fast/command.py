"""Command: the errors of a command as one line and an exit code."""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from hrf_fast.distributed.launcher import speaker
from hrf_fast.errors import Interrupted, UserCodeError

RESUMES = "the same command resumes the run"
LESS_MEMORY = (
    "Less is taken by smaller calls (compute.images_per_call; --images-per-call of hrf sample), "
    "compute.activations=checkpoint, compute.precision=bf16 and, of text-to-image models, by adapters (lora.rank, "
    "lora.base_precision) and compute.offload=true; `hrf plan` says what fits"
)


def run_command(command: Callable[[], Any], interrupted: str = "") -> int:
    """Run a command and turn the errors that a user can mend into one line and an exit code.

    HRF_TRACEBACK=1 shows the traceback too, and an error of user code says so; `interrupted` is what a signal leaves to
    be said.

    Returns:
        0, 1 for an error, 128 and the signal's number after a signal: 130 after Ctrl-C.
    """
    return quiet_when_unread(lambda: _run(command, interrupted))


def quiet_when_unread(command: Callable[[], int]) -> int:
    """Run a command to its exit code; end it without a word where the reader of its output, such as `head`, has left.

    Returns:
        The command's own exit code, or 1 where nobody reads.
    """
    try:
        try:
            return command()
        finally:
            # argparse's help too; at the end of the interpreter the error would be printed
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _is_unread() -> bool:
    """Whether it is standard output whose reader has left, and not that of a command's pipe to another process."""
    if sys.stdout is None:
        return False
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    if not hasattr(select, "poll"):
        return False
    # unbuffered output has nothing left to flush
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in watched.poll(0))


def _run(command: Callable[[], Any], interrupted: str) -> int:
    try:
        command()
        return 0
    except KeyboardInterrupt as error:
        stop = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
        print(f"\nstopped by {stop.name}" + (f"; {interrupted}" if interrupted else ""), file=sys.stderr)
        return 128 + stop.number
    except (ValueError, ImportError, OSError, RuntimeError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            raise
        # torch's class, by its name: a command imports torch where it needs it
        out_of_memory = type(error).__name__ == "OutOfMemoryError"
        if isinstance(error, RuntimeError) and not (out_of_memory or isinstance(error, UserCodeError)):
            raise
        if traced := bool(os.environ.get("HRF_TRACEBACK")):
            traceback.print_exc()
        rank = speaker()
        # what all ranks fail with is said by one
        if rank == 0 or not getattr(error, "on_all_ranks", False):
            text = f"{(str(error) or 'out of memory.').splitlines()[0]} {LESS_MEMORY}" if out_of_memory else str(error)
            print(f"error: rank {rank}: {text}" if rank else f"error: {text}", file=sys.stderr)
            if not traced and (isinstance(error, UserCodeError) or out_of_memory or error.__cause__ is not None):
                mended = f"; mend it, and {interrupted}" if interrupted and isinstance(error, UserCodeError) else ""
                print(f"HRF_TRACEBACK=1 in the environment shows the whole traceback{mended}", file=sys.stderr)
        return 1
