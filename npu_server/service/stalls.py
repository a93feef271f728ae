"""An end to waiting for clients that say nothing or read nothing."""

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

# Half a megabit a second: who is slower than that is not training over this link.
_SLOWEST_BYTES_PER_S = 2**16
_CHECK_EVERY_S = 0.25
# Whoever is not heard for longer than this is not silent: it is this process that stands still.
_LONGEST_TICK_S = 0.5

Clock = Callable[[], float]


class Wait:
    """One direction of a call, which waits for the client now and then.

    Patience runs out while it waits and grows with what comes, so that a byte now and then does not keep a
    call alive for ever. What the server itself delays does not count.

    Args:
        patience_s: seconds to wait in all, until `renew`.
        expire: ends the call; called once, on a `StallWatch`'s thread.
        clock: monotonic seconds.
    """

    def __init__(
        self, patience_s: float, expire: Callable[[], object], clock: Clock = time.monotonic
    ) -> None:
        self.expire = expire
        self.due: float | None = None
        self._patience_s = patience_s
        self._left_s = patience_s
        self._clock = clock
        self._begin = 0.0

    def start(self) -> None:
        """From now on it is the client's turn."""
        self._begin = self._clock()
        self.due = self._begin + self._left_s

    def stop(self, received: int) -> None:
        """The client has sent something: so many bytes."""
        self.due = None
        left = self._left_s - (self._clock() - self._begin) + received / _SLOWEST_BYTES_PER_S
        self._left_s = min(self._patience_s, left)

    def renew(self) -> None:
        """Whatever was awaited is complete; full patience for the next."""
        self.due, self._left_s = None, self._patience_s


class StallWatch:
    """Ends what waits for too long; one thread for all calls.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._now = self._seen = clock()
        self._lock = threading.Lock()
        self._waits: set[Wait] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="npu-stalls", daemon=True)
        self._thread.start()

    def now(self) -> float:
        """Seconds on a clock that stands still while this process does (stopped, starved)."""
        return self._now + min(self._clock() - self._seen, _LONGEST_TICK_S)

    def watch(self, *waits: Wait) -> None:
        """Begins to look at some."""
        with self._lock:
            self._waits.update(waits)

    def forget(self, *waits: Wait) -> None:
        """Looks at them no more."""
        with self._lock:
            self._waits.difference_update(waits)

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        """Calls `action` once, in so many seconds."""
        wait = Wait(seconds, action, self.now)
        wait.start()
        self.watch(wait)

    def tick(self) -> None:
        """Lets the clock go on, and ends what is overdue."""
        with self._lock:
            self._now, self._seen = self.now(), self._clock()
            now = self._now
            overdue = {wait for wait in self._waits if (due := wait.due) is not None and due <= now}
            self._waits -= overdue
        for wait in overdue:
            try:
                wait.expire()
            except Exception:
                log.exception("a call that stalls could not be ended")

    def close(self) -> None:
        """Stops looking; idempotent."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_CHECK_EVERY_S):
            self.tick()
