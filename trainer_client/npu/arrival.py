"""How the tensors of one stream arrive: in its messages, or in memory that the server shares."""

import logging

from npu_wire.errors import DeviceFault
from npu_wire.framing import Received
from npu_wire.shared_memory import SUPPORTED, NotShared, Window, open_window
from npu_wire.v1 import npu_pb2

log = logging.getLogger(__name__)


class Arrival:
    """One stream's.

    Args:
        local: whether the endpoint may be on this host and the user wants shared memory.

    Attributes:
        way: where tensors are, in words.
    """

    def __init__(self, local: bool) -> None:
        self.wanted = local and SUPPORTED
        self.way = "tensors in its messages"
        self._window: Window | None = None

    def attached(self, message: npu_pb2.Attached) -> None:
        """Takes up what the server offers."""
        if not message.HasField("shared_memory"):
            if self.wanted:
                self.way += ", the server offers no shared memory"
            return
        try:
            offer = message.shared_memory
            self._window = open_window(offer.socket, offer.token)
        except NotShared as reason:
            self.way += f", no shared memory: {reason}"
            log.info("%s", self.way)
        else:
            self.way = "tensors in shared memory"

    def data(self, received: Received[npu_pb2.ForwardResponse]) -> memoryview | None:
        """A tensor's bytes, where they are not in its message.

        Raises:
            DeviceFault: they are said to be where no memory is shared.
        """
        if not received.message.tensor.HasField("shared"):
            if self._window is not None:
                self._window.flush()
            return received.data
        shared = received.message.tensor.shared
        if self._window is None:
            raise DeviceFault("the server speaks of shared memory that it has not given")
        try:
            return self._window.view(shared.slot, shared.offset, shared.length)
        except ValueError as error:
            raise DeviceFault(f"the server speaks of shared memory that there is not: {error}") from None

    def close(self) -> None:
        """Takes no more; what has arrived stays valid. Idempotent."""
        window, self._window = self._window, None  # which leaves the memory to the tensors in it
        if window is not None:
            window.close()
