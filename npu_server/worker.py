"""The one thread that a device's calls go through."""

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, TypeVar

from npu_wire.errors import ServerUnavailable

T = TypeVar("T")

Steps = Generator[None, None, T]
"""A job done bit by bit: other sessions have their turn wherever it yields; its result is what it returns."""

_CLOSED = "the server is shutting down; try again when it is back"


class DeviceWorker:
    """Runs jobs on one thread: in order within a session, in turn between sessions.

    A turn is one step of a session's first job; then every other session with work has its turn before it
    is this one's again. A job's exception goes to its future; the thread lives on.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # A session keeps its place while a step of it runs: what it queues meanwhile comes after the others.
        self._queues: OrderedDict[str, deque[_Job]] = OrderedDict()
        self._closing = False
        self._last: Callable[[], object] | None = None
        self._thread = threading.Thread(target=self._run, name="npu-device", daemon=True)
        self._thread.start()

    def submit(self, session_id: str, job: Callable[[], T]) -> "Future[T]":
        """Queues a job of one step behind the session's earlier ones.

        Raises:
            ServerUnavailable: the worker is closed.
        """
        return self.submit_steps(session_id, one_step(job))

    def submit_steps(self, session_id: str, steps: Steps[T]) -> "Future[T]":
        """Queues a job of many steps behind the session's earlier ones.

        Raises:
            ServerUnavailable: the worker is closed.
        """
        job = _Job(steps)
        with self._changed:
            if self._closing:
                raise ServerUnavailable(_CLOSED)
            self._queues.setdefault(session_id, deque()).append(job)
            self._changed.notify()
        return job.future

    def depth(self) -> int:
        """Jobs that wait for their first step."""
        with self._changed:
            return sum(not job.begun for queue in self._queues.values() for job in queue)

    def close(self, timeout_s: float, last: Callable[[], object] | None = None) -> bool:
        """Refuses new jobs, finishes the queued ones and, after all of them, `last`.

        Returns:
            Whether that was done in time. If not, everyone who waits for a job hears ServerUnavailable.
        """
        with self._changed:
            self._last = last or self._last
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        with self._changed:
            left = [job for queue in self._queues.values() for job in queue]
        for job in left:
            with contextlib.suppress(InvalidStateError):
                job.future.set_exception(ServerUnavailable(_CLOSED))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while self._take_turn():
            pass
        if self._last is not None:
            self._last()

    def _take_turn(self) -> bool:
        # A method of its own: while the thread waits, no variable of it keeps the last job alive.
        with self._changed:
            while not self._queues:
                if self._closing:
                    return False
                self._changed.wait()
            session_id, queue = next(iter(self._queues.items()))
            job = queue[0]
        finished = job.step()
        with self._changed:
            if finished:
                queue.popleft()
            if queue:
                self._queues.move_to_end(session_id)
            else:
                del self._queues[session_id]
        return True


@dataclass(eq=False)
class _Job:
    steps: Steps[Any]
    future: "Future[Any]" = field(default_factory=Future)
    begun: bool = False

    def step(self) -> bool:
        """Runs the next step and tells whether it was the last one."""
        self.begun = True
        try:
            next(self.steps)
            return False
        except StopIteration as end:
            value = end.value
            with contextlib.suppress(InvalidStateError):
                self.future.set_result(value)
        except BaseException as error:
            with contextlib.suppress(InvalidStateError):
                self.future.set_exception(error)
            # The error's traceback holds this frame, and the future the error: no cycle, please.
            del self
        return True


def one_step(job: Callable[[], T]) -> Steps[T]:
    """A function as a job."""
    return job()
    yield
