"""The device: a backend, the one thread that its calls go through, and what it said of itself."""

import logging
from concurrent.futures import Future

from npu_server.seam import Backend, Health, Program, Ranges
from npu_server.service.worker import DeviceWorker
from npu_wire.device import Capabilities
from npu_wire.errors import DeviceFault

log = logging.getLogger(__name__)

_OWN_ID = "server"


class Device:
    """An NPU that a server holds.

    Args:
        backend: the NPU; nobody else calls it.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._capabilities: Capabilities | None = None
        self.worker = DeviceWorker()

    @property
    def capabilities(self) -> Capabilities:
        """What it is and can do; known once it is open."""
        assert self._capabilities is not None
        return self._capabilities

    def open(self) -> None:
        """Takes hold of it.

        Raises:
            DeviceFault: there is no such device, or it is not well.
        """
        self._capabilities = self.worker.submit(_OWN_ID, self._backend.open).result()
        state = self.probe().result()
        if not state.ok:
            raise DeviceFault(f"the device is not well: {state.detail}")

    def probe(self) -> "Future[Health]":
        """Asks it, in its turn with the sessions, whether it is well.

        Raises:
            ServerUnavailable: it is closed.
        """
        return self.worker.submit(_OWN_ID, self._backend.probe)

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        """Compiles on the calling thread; see `npu_server.seam.Backend.compile`."""
        return self._backend.compile(model, ranges)

    def close(self, timeout_s: float) -> bool:
        """Finishes what is queued, then lets go of it; tells whether that was done in time."""
        return self.worker.close(timeout_s, self._let_go)

    def _let_go(self) -> None:
        try:
            self._backend.close()
        except Exception:
            log.exception("closing the device failed")
