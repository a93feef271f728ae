"""Giving back what nobody refers to any more: sessions, the channel and the embedded server.

A notebook cell that runs again drops a connection or a prepared model without a word. Threads of the session
and of gRPC keep its inner objects alive, so what a user holds is an outer object that none of them knows;
when it goes, what it stood for is given back.
"""

import atexit
import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from npu_wire.errors import ServerUnavailable
from npu_wire.layer_map import Array, Float32Array, Int8Array, LayerMap
from trainer_client.npu.embedded import EmbeddedServer
from trainer_client.npu.journal import SentBatch
from trainer_client.npu.session import LayerTiming
from trainer_client.npu.stream import RemoteSession
from trainer_client.npu.transport import Transport

log = logging.getLogger(__name__)

_FLUSH_TIMEOUT_S = 10.0


class Belongings:
    """What a connection has to give back, at the latest when the interpreter exits.

    Finalizers run wherever the garbage collector strikes, be it a thread of gRPC that holds a lock. So they
    only queue the work, for a thread of its own.

    Args:
        transport: the channel.
        embedded: the server, if it is ours.
    """

    def __init__(self, transport: Transport, embedded: EmbeddedServer | None) -> None:
        self._transport = transport
        self._embedded = embedded
        self._sessions: set[RemoteSession] = set()
        self._lock = threading.RLock()
        self._closed = False
        self._process = os.getpid()
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work_off, name="npu-release", daemon=True).start()
        atexit.register(self.close)

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._closed

    def require_own_process(self) -> None:
        """Checks that this is the process that connected.

        Raises:
            ServerUnavailable: it was forked from that one; says what to do instead.
        """
        if os.getpid() != self._process:
            raise ServerUnavailable(
                f"this connection to {self._transport.address} belongs to process {self._process}, which "
                f"process {os.getpid()} was forked from; gRPC does not survive a fork. Connect in the forked "
                "process, or start it with multiprocessing_context='spawn' (a DataLoader's argument)"
            )

    def revive(self) -> None:
        """Starts the embedded server again if it is dead."""
        if self._embedded is not None:
            self._embedded.ensure_running()

    @property
    def ways(self) -> tuple[str, ...]:
        """How tensors come, of each session."""
        with self._lock:
            return tuple(session.way for session in self._sessions)

    def add(self, session: RemoteSession) -> None:
        """Adds a session."""
        with self._lock:
            self._sessions.add(session)

    def release(self, session: RemoteSession) -> None:
        """Releases a session on the server; idempotent."""
        session.close()
        with self._lock:
            self._sessions.discard(session)

    def when_unreferenced(self, holder: object, give_back: Callable[[], object]) -> None:
        """Calls `give_back`, which must not refer to `holder`, once nobody refers to `holder`."""
        weakref.finalize(holder, self._later, give_back).atexit = False

    def settle(self) -> None:
        """Waits until what is unreferenced by now is given back: a quota may leave no place beside it."""
        done = threading.Event()
        self._work.put(done.set)
        done.wait(_FLUSH_TIMEOUT_S)

    def close(self) -> None:
        """Gives everything back; idempotent. A forked process inherits the exit handler, but owns nothing."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            atexit.unregister(self.close)
            for session in self._sessions:
                session.close()
            self._sessions.clear()
            self._transport.close()
            if self._embedded is not None:
                self._embedded.close()
            self._work.put(None)

    def _later(self, give_back: Callable[[], object]) -> None:
        if os.getpid() == self._process:
            self._work.put(give_back)

    def _work_off(self) -> None:
        for give_back in iter(self._work.get, None):
            try:
                give_back()
            except Exception:
                log.warning("giving back what nobody refers to any more failed", exc_info=True)
            del give_back  # it refers to a session, which holds its model


class HeldSession:
    """A session for as long as somebody refers to it; implements `trainer_client.npu.session.Session`.

    Args:
        stream: the session.
        belongings: of the connection, which has the session already.
        connection: kept as long as this.
    """

    def __init__(self, stream: RemoteSession, belongings: Belongings, connection: object) -> None:
        self._stream = stream
        self._belongings = belongings
        self._connection = connection
        belongings.when_unreferenced(self, partial(belongings.release, stream))

    @property
    def layer_map(self) -> LayerMap:
        """Inputs, layers and outputs of the program."""
        return self._stream.layer_map

    @property
    def way(self) -> str:
        """How tensors come from the server, in words."""
        return self._stream.way

    def push_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        """Sends changed FP32 initializers; see `RemoteSession.push_weights`.

        Raises:
            ServerUnavailable: see `Belongings.require_own_process`.
        """
        self._belongings.require_own_process()
        self._stream.push_weights(tensors)

    def submit(self, inputs: Mapping[str, Array], taps: Collection[int]) -> "HeldBatch":
        """Sends one batch and returns at once; see `RemoteSession.submit`.

        Raises:
            ServerUnavailable: see `Belongings.require_own_process`.
        """
        self._belongings.require_own_process()
        return HeldBatch(self._stream.submit(inputs, taps), self._belongings, self)

    def close(self) -> None:
        """Releases the session on the server; idempotent."""
        self._belongings.release(self._stream)


class HeldBatch:
    """A batch that keeps its session; implements `trainer_client.npu.session.PendingBatch`."""

    def __init__(self, batch: SentBatch, belongings: Belongings, session: HeldSession) -> None:
        self._batch = batch
        self._belongings = belongings
        self._session = session

    def tensor(self, layer: int) -> Int8Array:
        """Waits for a layer's output; see `PendingBatch.tensor`.

        Raises:
            ServerUnavailable: see `Belongings.require_own_process`.
        """
        self._belongings.require_own_process()
        return self._batch.tensor(layer)

    def timings(self) -> Sequence[LayerTiming]:
        """Timings of the tensors that have arrived so far."""
        return self._batch.timings()
