"""Lock: one process at a time trains in a run folder. The system releases it when the process dies, by SIGKILL too."""

from __future__ import annotations

import os
import socket
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
    # a run may be closed by another thread than the one that opened it
    lock = FileLock(folder / NAME, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        owner = (folder / OWNER).read_text().strip() if (folder / OWNER).is_file() else "another process"
        raise ValueError(
            f"run.folder {folder} is in use by {owner}, and two can't train in one folder; wait for it, stop it, or "
            "choose another run.folder"
        ) from None
    try:
        write_atomically(folder / OWNER, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError:
        lock.release()
        raise
    return lock
