"""The one thread that a device's calls go through."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from npu_wire.errors import ServerUnavailable

T = TypeVar("T")


class DeviceWorker:
    """Runs jobs one at a time, in order within a session and in turn between sessions.

    A job's exception goes to its future; the thread lives on.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queues: OrderedDict[str, deque[Callable[[], None]]] = OrderedDict()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="npu-device", daemon=True)
        self._thread.start()

    def submit(self, session_id: str, job: Callable[[], T]) -> Future[T]:
        """Queues a job behind the session's earlier ones.

        Raises:
            ServerUnavailable: the worker is closed.
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            if self._closing:
                raise ServerUnavailable("the server is shutting down; try again when it is back")
            self._queues.setdefault(session_id, deque()).append(run)
            self._changed.notify()
        return future

    def depth(self) -> int:
        """Jobs that wait."""
        with self._changed:
            return sum(len(queue) for queue in self._queues.values())

    def close(self, timeout_s: float) -> bool:
        """Refuses new jobs, finishes the queued ones, and tells whether that was done in time."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            job()

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._queues:
                if self._closing:
                    return None
                self._changed.wait()
            session_id, queue = next(iter(self._queues.items()))
            job = queue.popleft()
            if queue:
                self._queues.move_to_end(session_id)
            else:
                del self._queues[session_id]
            return job
