"""The one thread that a device's calls go through."""

import contextlib
import threading
import time
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

    The next step is of the session that has had the device for the shortest time, and among equals of the
    one that has waited longest. Time in which a session wants nothing is not saved up. So whoever has little
    to do waits for about one step of each other session, and whoever has much gets the same share as they.
    A job's exception goes to its future; the thread lives on.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._queues: OrderedDict[str, deque[_Job]] = OrderedDict()  # the one that ran last is last
        self._used_s: dict[str, float] = {}
        self._least_s = 0.0
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

    def submit_steps(
        self, session_id: str, steps: Steps[T], waiting: Callable[[], int] | None = None
    ) -> "Future[T]":
        """Queues a job of many steps behind the session's earlier ones.

        Args:
            session_id: whose turns it takes.
            steps: the job.
            waiting: for one that does many things in turn: how many it has not begun.

        Raises:
            ServerUnavailable: the worker is closed.
        """
        job = _Job(steps, waiting)
        with self._changed:
            if self._closing:
                raise ServerUnavailable(_CLOSED)
            if session_id not in self._queues:
                self._queues[session_id] = deque()
                self._used_s[session_id] = max(self._used_s.get(session_id, 0.0), self._least_s)
            self._queues[session_id].append(job)
            self._changed.notify()
        return job.future

    def depth(self) -> int:
        """Jobs that wait for their first step."""
        with self._changed:
            return sum(job.depth() for queue in self._queues.values() for job in queue)

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
            session_id = min(self._queues, key=self._used_s.__getitem__)
            queue = self._queues[session_id]
            job = queue[0]
            self._least_s = self._used_s[session_id]
        begin = self._clock()
        finished = job.step()
        with self._changed:
            self._used_s[session_id] += self._clock() - begin
            self._queues.move_to_end(session_id)
            if finished:
                queue.popleft()
            if not queue:
                del self._queues[session_id]
                self._forget_the_rested()
        return True

    def _forget_the_rested(self) -> None:
        """Drops the time of sessions that want nothing and would begin with the least again anyway."""
        for session_id, used_s in list(self._used_s.items()):
            if used_s <= self._least_s and session_id not in self._queues:
                del self._used_s[session_id]


@dataclass(eq=False)
class _Job:
    steps: Steps[Any]
    waiting: Callable[[], int] | None
    future: "Future[Any]" = field(default_factory=Future)
    begun: bool = False

    def depth(self) -> int:
        """What of it waits to be begun."""
        return self.waiting() if self.waiting is not None else not self.begun

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
