"""Who may wait in a thread of the server: silence gives way to speech."""

import threading
from collections import OrderedDict
from collections.abc import Callable

from npu_wire.errors import QuotaExceeded


class Ticket:
    """A call's place in a `Lobby`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._end: Callable[[], object] | None = None
        self._evicted = False

    def bind(self, end: Callable[[], object]) -> None:
        """Tells how the call can be ended.

        Raises:
            QuotaExceeded: it has lost its place already.
        """
        with self._lock:
            self._end = end
            if self._evicted:
                raise QuotaExceeded("too many calls are open and say nothing; try again")

    def evict(self) -> None:
        """Ends the call, because another takes its place."""
        with self._lock:
            self._evicted = True
            end = self._end
        if end is not None:
            end()


class Lobby:
    """Calls that keep a thread and owe nobody an answer; when it is full, the oldest gives way to the newest.

    So a crowd of silent calls never keeps out one that has something to say.

    Args:
        places: calls that may wait.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._lock = threading.Lock()
        self._tickets: OrderedDict[Ticket, None] = OrderedDict()

    def enter(self) -> Ticket:
        """Takes a place."""
        ticket, oldest = Ticket(), None
        with self._lock:
            if len(self._tickets) >= self._places:
                oldest, _ = self._tickets.popitem(last=False)
            self._tickets[ticket] = None
        if oldest is not None:
            oldest.evict()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Gives the place back; idempotent."""
        with self._lock:
            self._tickets.pop(ticket, None)


class OpenCalls:
    """Counts the calls that a shutdown waits for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    def enter(self, when_over: Callable[[Callable[[], None]], bool]) -> None:
        """Counts a call until gRPC calls back: when its handler returns, its answer has yet to be sent."""
        with self._changed:
            self._count += 1
        if not when_over(self._leave):
            self._leave()

    def wait_until_none(self, timeout_s: float) -> bool:
        """Waits for all of them and tells whether it was so in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count == 0, timeout_s)

    def _leave(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()
