"""Lock: one process at a time trains in a run folder. The system releases it when the process dies, by SIGKILL too."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from hrf_fast.run.files import write_atomically

NAME = ".lock"
# beside the lock, since a locked file cannot be read on every system
OWNER = ".lock-owner"


def lock_folder(folder: Path) -> BaseFileLock:
    """Take the folder until the returned lock is released; both files stay, since removing a lock file is a race.

    Raises:
        ValueError: another process has it; says which.
        OSError: the folder can't be written.
    """
    way_out = "wait for it, stop it, or choose another run.folder"
    return _lock(folder, f"run.folder {folder}", f"can't train in one folder; {way_out}")


@contextmanager
def blending(folder: Path) -> Iterator[None]:
    """Have the folder of a run's blends inside; errors as of `lock_folder`."""
    lock = _lock(folder, str(folder), "can't blend one run; wait for it, or stop it")
    try:
        yield
    finally:
        lock.release()


def _lock(folder: Path, named: str, no_two: str) -> BaseFileLock:
    # a run may be closed by another thread than the one that opened it
    lock = FileLock(folder / NAME, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        owner = (folder / OWNER).read_text().strip() if (folder / OWNER).is_file() else "another process"
        # where the file system has no flock, a process of another machine leaves its lock behind when it is killed
        elsewhere = not owner.endswith(socket.gethostname())
        gone = f"; if that process is gone, delete {folder / NAME}" if elsewhere else ""
        raise ValueError(f"{named} is in use by {owner}, and two {no_two}{gone}") from None
    try:
        write_atomically(folder / OWNER, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError:
        lock.release()
        raise
    return lock
