"""Worker: one thread that does what it is asked, in order, and that a process may leave behind."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple


class _Task(NamedTuple):
    future: Future[Any]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Worker:
    """As ThreadPoolExecutor(1), for whose thread Python waits when it exits: Ctrl-C must not wait for a reward."""

    def __init__(self, name: str) -> None:
        """Start the thread; `name` is the thread's."""
        self.closed = False
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """The result to be of a call, or the error that it raises.

        Raises:
            RuntimeError: the thread was closed, so nobody would ever do it.
        """
        if self.closed:
            raise RuntimeError("the worker is closed")
        future: Future[Any] = Future()
        self._tasks.put(_Task(future, function, arguments))
        return future

    def close(self) -> None:
        """Cancel what has not begun and end the thread after what it does now."""
        self.closed = True
        while True:
            try:
                task = self._tasks.get_nowait()
            except Empty:
                break
            if task is not None:
                task.future.cancel()
        self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if not task.future.set_running_or_notify_cancel():
                continue
            try:
                task.future.set_result(task.function(*task.arguments))
            except BaseException as error:
                task.future.set_exception(error)
            # nothing of a call outlives it
            del task
