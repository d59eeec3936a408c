"""Lock: one process at a time trains in a run folder. The system releases it when the process dies, by SIGKILL too."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

NAME = ".lock"


def lock_folder(folder: Path) -> IO[str]:
    """Take the folder until the returned file is closed; the file stays, since removing a lock file is a race.

    Raises:
        ValueError: another process has it; says which.
        OSError: the folder can't be written.
    """
    file = open(folder / NAME, "a+")  # noqa: SIM115 (held until the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise ValueError(
            f"run.folder {folder} is in use by {owner}, and two can't train in one folder; wait for it, stop it, or "
            "choose another run.folder"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
