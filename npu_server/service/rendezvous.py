"""Where clients on this host pick up the memory in which their tensors will lie."""

import logging
import secrets
import socket
import threading
import time

from npu_wire.shared_memory import (
    SMALLEST_TENSOR,
    SUPPORTED,
    TOKEN_BYTES,
    Arena,
    NotShared,
    Slot,
    listen,
    receive_token,
)
from npu_wire.v1 import npu_pb2

log = logging.getLogger(__name__)

_BREATH_S = 0.2


class Rendezvous:
    """A socket that knows streams by their tokens; closed by `close`.

    Args:
        max_bytes: of memory shared with all clients; one stream may take as much. 0: none is offered.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._name = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._waiting: dict[bytes, StreamMemory] = {}
        self._committed = 0
        self._listener: socket.socket | None = None
        if max_bytes and SUPPORTED:
            try:
                self._listener = listen(self._name)
            except OSError as error:
                log.warning("no shared memory for clients on this host: no socket (%s)", error.strerror)
                return
            self._thread = threading.Thread(
                target=self._serve, args=(self._listener,), name="npu-shared-memory", daemon=True
            )
            self._thread.start()

    def offer(self, memory: "StreamMemory") -> npu_pb2.SharedMemoryOffer | None:
        """What to tell a client that wants memory for a stream; None: it cannot be had."""
        if self._listener is None:
            return None
        token = secrets.token_bytes(TOKEN_BYTES)
        with self._lock:
            self._waiting[token] = memory
        return npu_pb2.SharedMemoryOffer(socket=self._name, token=token)

    def withdraw(self, offer: npu_pb2.SharedMemoryOffer) -> None:
        """Nobody may take it up any more; idempotent."""
        with self._lock:
            self._waiting.pop(offer.token, None)

    def commit(self, count: int) -> bool:
        """Takes so many bytes for a stream, or gives them back (below 0); False: there are not so many."""
        with self._lock:
            if self._committed + count > self.max_bytes:
                return False
            self._committed += count
            return True

    @property
    def committed(self) -> int:
        """Bytes of memory that streams have taken."""
        return self._committed

    def close(self) -> None:
        """Lets nobody in any more; idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
            self._thread.join()
            listener.close()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError as error:
                if self._listener is None:
                    return
                log.warning("a client gets no shared memory: %s", error.strerror)
                time.sleep(_BREATH_S)  # there are no descriptors left, say
                continue
            try:
                self._admit(peer)
            except (OSError, NotShared) as error:
                peer.close()
                log.info("a client gets no shared memory: %s", error)

    def _admit(self, peer: socket.socket) -> None:
        token = receive_token(peer)
        with self._lock:
            memory = self._waiting.pop(token, None)
        if memory is None:
            raise NotShared("its token is of no stream that waits for one")
        arena = Arena(self.max_bytes, self.commit, peer)
        try:
            arena.hand_over()
        except BaseException:
            arena.close()
            raise
        memory.use(arena)


class StreamMemory:
    """What one stream shares with its client: nothing until the client has picked it up.

    Only `use` may be called from another thread than the stream's.

    Args:
        rendezvous: the server's.
        wanted: whether the client has asked.
    """

    def __init__(self, rendezvous: Rendezvous, wanted: bool) -> None:
        self._rendezvous = rendezvous
        self._wanted = wanted
        self._offer: npu_pb2.SharedMemoryOffer | None = None
        self._lock = threading.Lock()
        self._arena: Arena | None = None
        self._closed = False

    def offer(self) -> npu_pb2.SharedMemoryOffer | None:
        """What to tell the client."""
        if self._wanted:
            self._offer = self._rendezvous.offer(self)
        return self._offer

    def use(self, arena: Arena) -> None:
        """The client has mapped it."""
        with self._lock:
            if self._closed:
                arena.close()
            else:
                self._arena = arena

    def place(self, data: memoryview) -> Slot | None:
        """Puts a tensor where the client sees it; None: send its bytes."""
        if self._arena is None or data.nbytes < SMALLEST_TENSOR:
            return None
        return self._arena.place(data)

    def close(self) -> None:
        """Ends it; tensors that the client has stay as they are."""
        if self._offer is not None:
            self._rendezvous.withdraw(self._offer)
        with self._lock:
            self._closed = True
        if self._arena is not None:
            self._arena.close()
            self._rendezvous.commit(-self._arena.committed)
            self._arena = None
