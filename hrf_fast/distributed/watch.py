"""Watch: a connection of every rank to rank 0, by which a rank that dies is found and named; its death ends the job.

A collective alone would wait for a dead rank until its time limit, or fail with an address. The system closes a
process's connections whenever it ends, by SIGKILL too, so the other side hears of it at once, on this machine, in
another container or on another machine. And the system answers probes (TCP keepalive) for a process that lives but
can't run: one that holds Python's lock in native code, is stopped or swapped out. So a process may be silent as long as
it likes, and a machine until a limit. A suspended machine stops its own clock too. Imports no torch.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

# seconds to connect at the start, to read what follows a first byte, and for a death to become known
_CONNECT, _READ, _NEWS = 60.0, 5.0, 10.0
_LEFT, _FAILED, _TOLD = b"L", b"F", b"T"


class Watch:
    """A thread on each rank; ends the process when another rank has died or failed."""

    def __init__(self, rank: int, world_size: int, share: Callable[[Any], Any], *, lost_after: float) -> None:
        """Connect all ranks.

        Args:
            share: collective, returns rank 0's value on every rank.
            lost_after: seconds after which a machine that answers no probe is given up.

        Raises:
            ConnectionError: a rank can't reach rank 0.
        """
        self.rank = rank
        self._lost_after = lost_after
        self._left = threading.Event()
        self._wake, self._woken = socket.socketpair()
        # connection to a rank, and the rank's number, process and machine in words
        self._peers: dict[socket.socket, str] = {}
        if rank == 0:
            self._accept(world_size, share)
        else:
            self._connect(share(None))
        _WATCHES.add(self)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _accept(self, world_size: int, share: Callable[[Any], Any]) -> None:
        token = secrets.token_hex(16)
        with _server(world_size) as server:
            hosts = [os.environ.get("MASTER_ADDR", "127.0.0.1"), socket.gethostname()]
            share([hosts, server.getsockname()[1], token, self._me()])
            server.settimeout(_CONNECT)
            while len(self._peers) < world_size - 1:
                try:
                    connection, _ = server.accept()
                except TimeoutError as error:
                    raise ConnectionError(
                        f"only {len(self._peers) + 1} of {world_size} ranks have reached rank 0 in {_CONNECT:.0f} s; "
                        "see the other ranks' last lines"
                    ) from error
                # anybody may knock at an open port
                connection.settimeout(_READ)
                greeting, _, who = _read_line(connection).partition(" ")
                if greeting == token:
                    connection.sendall(f"{token}\n".encode())
                    self._keep(connection, who)
                else:
                    connection.close()

    def _connect(self, shared: Any) -> None:
        hosts, port, token, who = shared
        reasons = []
        for host in hosts:
            try:
                connection = socket.create_connection((host, port), timeout=_READ)
                connection.sendall(f"{token} {self._me()}\n".encode())
                connection.settimeout(_CONNECT)
                if _read_line(connection) == token:
                    return self._keep(connection, who)
                reasons.append(f"{host}: not rank 0")
            except OSError as error:
                reasons.append(f"{host}: {error}")
        raise ConnectionError(
            f"rank {self.rank} can't reach rank 0 at port {port} ({'; '.join(reasons)}); ranks must reach each other "
            "by TCP at any port: open the firewall between the machines, or set MASTER_ADDR to an address that all see"
        )

    def _me(self) -> str:
        return f"rank {self.rank} (process {os.getpid()} on {socket.gethostname()})"

    def _keep(self, connection: socket.socket, who: str) -> None:
        connection.settimeout(None)
        keep_alive(connection, self._lost_after)
        self._peers[connection] = who

    def leave(self, *, failed: bool) -> None:
        """This rank ends: with an error of its own, which the others must not wait for, or as all do."""
        self._left.set()
        self._wake.send(b".")
        self._thread.join()
        self._tell(_FAILED if failed else _LEFT)
        self.close()

    def close(self) -> None:
        """Close the connections, which the others take for this rank's death unless it has left."""
        for connection in (*self._peers, self._wake, self._woken):
            connection.close()

    def expect_death(self) -> None:
        """A collective may have failed: give the watch the time to name the rank that died; it ends the process."""
        self._left.wait(_NEWS)

    def _tell(self, message: bytes) -> None:
        for connection in self._peers:
            try:
                connection.sendall(message)
            except OSError:
                # this peer has gone too
                continue

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in (*self._peers, self._woken):
                selector.register(connection, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._woken:
                        return
                    assert isinstance(key.fileobj, socket.socket)
                    if news := self._hear(key.fileobj):
                        self._end(news)
                    selector.unregister(key.fileobj)

    def _hear(self, connection: socket.socket) -> str:
        """News of a death or failure; empty where the peer has left as all do."""
        who = self._peers[connection]
        try:
            kind = connection.recv(1)
            if kind == _TOLD:
                connection.settimeout(_READ)
                return _read_line(connection)
        except ConnectionError:
            # reset: it was gone before it had read everything
            kind = b""
        except OSError as error:
            return f"{who} does not answer any more ({error.strerror or error})"
        return {_LEFT: "", _FAILED: f"{who} has stopped with an error"}.get(kind, f"{who} has died")

    def _end(self, news: str) -> None:
        if self._left.is_set():
            return
        # rank 0 hears of everyone, the others of rank 0
        self._tell(_TOLD + f"{news}\n".encode())
        print(
            f"error: {news}, so rank {self.rank} stops too; see its last lines, then the same command resumes from the "
            "last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        # the main thread may be inside a collective that nothing but the end of the process interrupts
        os._exit(1)


def keep_alive(connection: socket.socket, lost_after: float) -> None:
    """Let the system probe the other machine, and fail the connection where none of the probes is answered.

    Args:
        lost_after: seconds of silence; the probes are sent in the second half.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle, probes = round(lost_after / 2), 5
    # macOS calls the first one TCP_KEEPALIVE
    options = {"TCP_KEEPIDLE": idle, "TCP_KEEPALIVE": idle, "TCP_KEEPINTVL": idle // probes, "TCP_KEEPCNT": probes}
    for name, value in options.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _server(world_size: int) -> socket.socket:
    try:
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=world_size)
    except (OSError, ValueError):
        # no IPv6 here
        return socket.create_server(("", 0), backlog=world_size)


def _read_line(connection: socket.socket) -> str:
    """The other side's words up to a line's end, or until it closes; empty where it is slow, or is no rank."""
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < 4096 and (more := connection.recv(4096 - len(line))):
            line += more
    except OSError:
        return ""
    return line.decode(errors="replace").strip()


_WATCHES: weakref.WeakSet[Watch] = weakref.WeakSet()


def _close_in_child() -> None:
    # a child that outlives its parent would hold the parent's connections open
    for watch in _WATCHES:
        watch.close()


# Windows has no fork
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
