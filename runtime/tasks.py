"""Tasks: what other threads ask of the engine's thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from ..adapters.errors import EngineStoppedError


class Tasks:
    """A queue that any thread may add to, and that the engine's thread runs between two steps.

    wake: set when a task was added.
    """

    def __init__(self, wake: threading.Event) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._is_closed = False

    def between_steps(self, task: Callable[[], None]) -> None:
        """Run a task on the engine's thread between two steps, and wait for it.

        Raises:
            EngineStoppedError: the engine runs no more tasks; else what the task raises.
        """
        self.soon(task).result()

    def soon(self, task: Callable[[], None]) -> Future[None]:
        """Run a task on the engine's thread before the next step, in the order of the calls.

        Raises:
            EngineStoppedError: the engine runs no more tasks.
        """
        done: Future[None] = Future()

        def run() -> None:
            try:
                task()
            except Exception as error:  # whatever it is, the caller waits for it
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._lock:
            if self._is_closed:
                raise EngineStoppedError("the engine is shutting down")
            self._queue.put(run)
        self._wake.set()
        return done

    def close(self) -> None:
        """Take nothing more; what was taken is still to be run."""
        with self._lock:
            self._is_closed = True

    def run(self) -> None:
        """Run all there are; on the engine's thread."""
        while True:
            try:
                task = self._queue.get_nowait()
            except Empty:
                return
            task()
