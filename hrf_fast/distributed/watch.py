"""Watch: every rank shows signs of life and watches for those of the others; one that dies ends the job, by name.

A collective alone would wait for a dead rank until its time limit, or fail with an address. So each rank counts up a
key in the store of the process group; the ranks of its own machine are also looked up in the process table.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

# seconds between signs of life, and without one until a rank counts as dead
_PULSE = 0.5
_SILENCE = 30.0


class Watch:
    """A thread on each rank; ends the process when another rank has died."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        # a client of its own: a collective may hold the process group's
        self._store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=60)
        )
        self._host = socket.gethostname()
        self._store.set(f"watch/{rank}/who", json.dumps([self._host, os.getpid()]))
        self._who = {r: json.loads(self._store.get(f"watch/{r}/who")) for r in range(world_size)}
        self._store.set(f"watch/{rank}/pulse", "0")
        dist.barrier()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def leave(self, *, failed: bool) -> None:
        """This rank ends: with an error of its own, which the others must not wait for, or as all do."""
        self._left.set()
        self._thread.join()
        try:
            self._store.set(f"watch/{self.rank}/pulse", "failed" if failed else "left")
        except RuntimeError:
            # the rank that serves the store has gone before
            return
        if self.rank == 0:
            # the store lives in this process: let the others see that it leaves
            time.sleep(2 * _PULSE)

    def expect_death(self) -> None:
        """A collective may have failed: give the watch the time to name the rank that died; it ends the process."""
        self._left.wait(_SILENCE / 3)

    def _watch(self) -> None:
        others = [r for r in range(self.world_size) if r != self.rank]
        seen: dict[int, tuple[Any, float]] = {r: (None, time.monotonic()) for r in others}
        beat = 0
        while not self._left.wait(_PULSE):
            beat += 1
            try:
                self._store.set(f"watch/{self.rank}/pulse", str(beat))
                pulses = {r: self._store.get(f"watch/{r}/pulse") for r in seen}
            except RuntimeError:
                # the store is served by rank 0, or by the launcher's agent
                if 0 in seen:
                    self._end(0, "has died" if self._gone(0) else "can't be reached")
                return
            now = time.monotonic()
            for r, pulse in pulses.items():
                if pulse == b"left":
                    del seen[r]
                elif pulse == b"failed":
                    self._end(r, "has stopped with an error")
                elif self._gone(r):
                    self._end(r, "has died")
                elif pulse != seen[r][0]:
                    seen[r] = (pulse, now)
                elif now - seen[r][1] > _SILENCE:
                    self._end(r, f"has shown no sign of life for {_SILENCE:.0f} s")

    def _gone(self, rank: int) -> bool:
        """Whether a rank of this machine has ended; its launcher may not have buried it yet."""
        host, pid = self._who[rank]
        if host != self._host or not sys.platform.startswith("linux"):
            return False
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
        except OSError:
            return True

    def _end(self, rank: int, what: str) -> None:
        if self._left.is_set():
            return
        host, pid = self._who[rank]
        print(
            f"error: rank {rank} (process {pid} on {host}) {what}, so rank {self.rank} stops too; see its last lines, "
            "then the same command resumes from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        # the main thread may be inside a collective that nothing but the end of the process interrupts
        os._exit(1)
