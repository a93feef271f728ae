"""What a stream has for the device, in order; it gives way while it must wait for its client."""

import threading
from collections import deque
from collections.abc import Generator
from typing import Generic, Protocol, TypeVar

from npu_server.service.worker import DeviceWorker, Steps
from npu_wire.errors import ServerUnavailable

Item = TypeVar("Item")
Done = TypeVar("Done", contravariant=True)
Kind = TypeVar("Kind")

Job = Generator[bool, None, None]
"""Work on an item. It yields False where others may have their turn, True when it lacks what has not come."""


class Performer(Protocol[Done]):
    """Whose agenda it is."""

    def perform(self, item: Done) -> Job:
        """The work on an item; raises nothing."""
        ...

    def is_crowded(self) -> bool:
        """Whether nothing may go on before the client has read what is there."""
        ...


class Agenda(Generic[Item]):
    """Items that are done one after the other on the device's thread.

    Args:
        worker: that thread.
        session_id: whose turns these are.
        performer: does them.
    """

    def __init__(self, worker: DeviceWorker, session_id: str, performer: Performer[Item]) -> None:
        self._worker = worker
        self._session_id = session_id
        self._performer: Performer[Item] | None = performer  # until `stop`: it holds this agenda
        self._lock = threading.Lock()
        self._items: deque[Item] = deque()
        self._job: Job | None = None
        self._is_running = False
        self._has_news = False

    def add(self, item: Item) -> None:
        """Queues an item; nothing happens after `stop`.

        Raises:
            ServerUnavailable: the device is closed.
        """
        with self._lock:
            if self._performer is None:
                return
            self._items.append(item)
        self.wake()

    def wake(self) -> None:
        """Goes on: something has come that a job waits for, or the client has read.

        Raises:
            ServerUnavailable: the device is closed.
        """
        with self._lock:
            self._has_news = True
            if self._is_running or (not self._items and self._job is None):
                return
            self._is_running = True
        try:
            self._worker.submit_steps(self._session_id, self._run(), self._items.__len__)
        except ServerUnavailable:
            self._is_running = False
            raise

    def take(self, kind: type[Kind]) -> Kind | None:
        """The next item, for the job at work to do it within: if it is of that kind."""
        with self._lock:
            if not self._items:
                return None
            item = self._items[0]
            if not isinstance(item, kind):
                return None
            self._items.popleft()
            return item

    def stop(self) -> None:
        """Forgets everything; the job at work ends at its next step."""
        with self._lock:
            self._performer = None
            self._items.clear()
        try:
            self.wake()  # so that the device's thread drops a job that waits
        except ServerUnavailable:
            self._job = None

    def _run(self) -> Steps[None]:
        while True:
            job = self._next()
            if job is None:
                return
            waits = next(job, None)
            if waits is None:
                self._job = None
            elif waits and self._is_idle():
                return
            del job
            yield

    def _next(self) -> Job | None:
        with self._lock:
            if self._performer is None:
                self._job, self._is_running = None, False
                return None
            self._has_news = False
            if (self._job is None and not self._items) or self._performer.is_crowded():
                self._is_running = False
                return None
            if self._job is None:
                self._job = self._performer.perform(self._items.popleft())
            return self._job

    def _is_idle(self) -> bool:
        with self._lock:
            self._is_running = self._has_news
            return not self._is_running
