"""Asks the device whether it is well, for as long as the server serves."""

import logging
import threading
from collections.abc import Callable
from concurrent import futures

from npu_server.seam import Health

log = logging.getLogger(__name__)

# A layer may take long on a slow device; one that has not come back after so many intervals hangs.
_LATE_INTERVALS = 4


class Watchdog:
    """Probes a device in its turn with the sessions and tells whenever its health changes.

    Args:
        probe: asks the device in its turn.
        interval_s: seconds between probes; a probe that waits for four of them has failed until it is back.
        tell: called from the watchdog's thread with every change; the device is well at first.
    """

    def __init__(
        self,
        probe: Callable[[], "futures.Future[Health]"],
        interval_s: float,
        tell: Callable[[Health], None],
    ) -> None:
        self._probe = probe
        self._interval_s = interval_s
        self._tell = tell
        self._well = True
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopped = False

    def start(self) -> None:
        """Begins."""
        threading.Thread(target=self._run, name="npu-watchdog", daemon=True).start()

    def suspect(self) -> None:
        """Has the device probed at once."""
        self._wake.set()

    def stop(self) -> None:
        """Ends; from now on nothing is told."""
        with self._lock:
            self._stopped = True
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait(self._interval_s)
            self._wake.clear()
            if self._stopped:
                return
            self._conclude(self._ask())

    def _ask(self) -> Health:
        try:
            answer = self._probe()
            patience_s = _LATE_INTERVALS * self._interval_s
            if not futures.wait([answer], patience_s).done:
                self._conclude(Health(False, f"it has not answered for {patience_s:g} s"))
            return answer.result()
        except Exception as error:
            return Health(False, f"asking it failed with {type(error).__name__}: {error}")

    def _conclude(self, health: Health) -> None:
        with self._lock:
            if self._stopped or health.ok == self._well:
                return
            self._well = health.ok
            if health.ok:
                log.warning("the device is well again")
            else:
                log.error("the device is not well: %s", health.detail)
            self._tell(health)
