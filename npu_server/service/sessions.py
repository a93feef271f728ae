"""Sessions: compiled programs with a lease."""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from npu_server.seam import Program, Ranges
from npu_server.service.device import Device
from npu_server.service.quotas import Account, Ledger, Limits, Memory
from npu_server.telemetry import LayerLatency, SessionStatus
from npu_wire.allocator import return_free_memory
from npu_wire.errors import NpuError, QuotaExceeded, ServerUnavailable, SessionLost
from npu_wire.layer_map import LayerMap

log = logging.getLogger(__name__)

# Compiling is Python and shares one interpreter with the device's thread: more at once would slow that down.
_COMPILERS = 4


class Stream(Protocol):
    """What a session knows of its open stream."""

    def cancel(self, error: NpuError | None = None) -> None:
        """Ends it now."""
        ...

    def finish(self, error: NpuError | None) -> None:
        """Ends it after what is queued."""
        ...

    def hang_up(self) -> None:
        """Ends its call now, without a word if none was said yet."""
        ...


@dataclass(eq=False)
class SessionEntry:
    """A compiled program that belongs to one client.

    Attributes:
        session_id: its name; not to be guessed, because who knows it may use it.
        program: only the device's worker calls it.
        layer_map: the program's.
        opened: time of opening, on the table's clock.
        expires: time when the lease ends, unless a stream is open.
        weights_version: of the weights in the program; changed by the device's worker.
        batches: batches computed.
        account: what it holds of the server's memory.
        stream: the open Forward stream.
        replaced: the stream before that, which may not have ended yet.
        latency: per layer.
    """

    session_id: str
    program: Program
    layer_map: LayerMap
    account: Account
    opened: float
    expires: float
    weights_version: int = 0
    batches: int = 0
    stream: Stream | None = None
    replaced: Stream | None = None
    latency: tuple[LayerLatency, ...] = field(default=())

    @property
    def short_id(self) -> str:
        """For logs and pages: who knows the whole id may use the session."""
        return self.session_id[:8]


@dataclass(eq=False)
class Place:
    """A reserved place for a session.

    Attributes:
        ledger: for the bytes of its model.
        given_up: set when nobody waits for the session any more.
        taken: whether the session is open.
    """

    ledger: Ledger
    given_up: threading.Event = field(default_factory=threading.Event)
    taken: bool = False


class SessionTable:
    """All sessions of one device.

    Args:
        device: the NPU.
        limits: quotas.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        device: Device,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[str, SessionEntry] = {}
        self._opening = 0
        self._memory = Memory(limits.max_server_bytes, limits.max_sessions, limits.stall_s)
        self._compilers = threading.BoundedSemaphore(_COMPILERS)
        self._stop = threading.Event()
        self._freed = threading.Event()
        self._reaper: threading.Thread | None = None

    def start_reaper(self) -> None:
        """Starts the thread that releases expired sessions."""
        self._reaper = threading.Thread(target=self._reap_until_stopped, name="npu-lease-reaper", daemon=True)
        self._reaper.start()

    @contextmanager
    def reserve(self) -> Iterator[Place]:
        """Holds a place for a session that is about to be opened, before its model is received.

        Raises:
            QuotaExceeded: all places are taken.
        """
        with self._lock:
            if len(self._sessions) + self._opening >= self._limits.max_sessions:
                raise QuotaExceeded(
                    f"all {self._limits.max_sessions} sessions of this server are taken; close one, "
                    "or start the server with a larger --max-sessions"
                )
            self._opening += 1
        place = Place(Ledger(Account(self._memory, self._limits.max_model_bytes)))
        try:
            yield place
        finally:
            place.ledger.close()
            with self._lock:
                if not place.taken:
                    self._opening -= 1

    def open(self, model: bytes, ranges: Ranges, place: Place) -> SessionEntry:
        """Compiles a model into a session, on a reserved place.

        Raises:
            NpuError: what the backend has against the model.
            SessionLost: nobody waits for it any more.
        """
        while not self._compilers.acquire(timeout=0.2):
            self._refuse_if_not_wanted(place)
        try:
            self._refuse_if_not_wanted(place)
            # A shutdown waits for the compilers, so that what they have made is closed before the device.
            return self._keep(self._device.compile(model, ranges), place)
        finally:
            self._compilers.release()

    def _keep(self, program: Program, place: Place) -> SessionEntry:
        session_id = secrets.token_hex(16)
        layer_map = program.layer_map
        now = self._clock()
        session = SessionEntry(
            session_id=session_id,
            program=program,
            layer_map=layer_map,
            account=Account(self._memory, self._limits.max_session_bytes),
            opened=now,
            expires=now + self._limits.lease_s,
            latency=tuple(LayerLatency(layer.name, layer.op) for layer in layer_map.layers),
        )
        with self._lock:
            wanted = not self._stop.is_set() and not place.given_up.is_set()
            if wanted:
                self._sessions[session_id] = session
                self._opening -= 1
                place.taken = True
        if not wanted:
            self._dispose(session, None)
            self._refuse_if_not_wanted(place)
        log.info("session %s opened: %d layers", session.short_id, len(layer_map.layers))
        return session

    def get(self, session_id: str) -> SessionEntry:
        """Finds a session and renews its lease.

        Raises:
            SessionLost: there is no such session.
        """
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None:
                raise SessionLost(
                    f"the server knows no session '{session_id[:8]}…': its lease is over or the server was "
                    "restarted; compile the model again"
                )
            session.expires = self._clock() + self._limits.lease_s
            return session

    def attach(self, session: SessionEntry, stream: Stream) -> None:
        """Makes `stream` the session's stream; an earlier one ends.

        Raises:
            SessionLost: the session was released in the meantime.
        """
        with self._lock:
            if self._sessions.get(session.session_id) is not session:
                raise SessionLost(f"session '{session.short_id}…' was released; compile the model again")
            earlier, session.stream = session.stream, stream
            overdue, session.replaced = session.replaced, earlier
        if overdue is not None:
            overdue.hang_up()  # so that a session has never more than two
        if earlier is not None:
            earlier.cancel(SessionLost(f"another stream was attached to session '{session.short_id}…'"))

    def detach(self, session: SessionEntry, stream: Stream) -> None:
        """Ends `stream`; the session's lease runs from now."""
        with self._lock:
            if session.stream is stream:
                session.stream = None
                session.expires = self._clock() + self._limits.lease_s
            if session.replaced is stream:
                session.replaced = None
        stream.cancel()
        self._freed.set()

    def release(self, session_id: str) -> None:
        """Ends a session; one that does not exist is none of our business."""
        with self._lock:
            session = self._sessions.pop(session_id, None)
        if session is not None:
            self._dispose(session, SessionLost(f"session '{session.short_id}…' was released"))

    def reap(self) -> int:
        """Releases the sessions whose lease is over and tells how many."""
        now = self._clock()
        with self._lock:
            expired = [s for s in self._sessions.values() if s.stream is None and s.expires <= now]
            for session in expired:
                del self._sessions[session.session_id]
        for session in expired:
            log.warning(
                "session %s: no sign of life for %g s; released", session.short_id, self._limits.lease_s
            )
            self._dispose(session, None)
        return len(expired)

    def drain(self) -> None:
        """Lets every stream finish what is queued and then end."""
        for session in self._snapshot():
            if session.stream is not None:
                session.stream.finish(ServerUnavailable("the server is shutting down"))

    def close(self, timeout_s: float) -> None:
        """Stops the reaper, releases every session, and waits for the compilers that are at work."""
        with self._lock:
            self._stop.set()
        if self._reaper is not None:
            self._reaper.join()
        for session in self._snapshot():
            self.release(session.session_id)
        end = time.monotonic() + timeout_s
        taken = [self._compilers.acquire(timeout=max(0.0, end - time.monotonic())) for _ in range(_COMPILERS)]
        if not all(taken):
            log.error("a model is still being compiled; its program is dropped")
        for _ in range(sum(taken)):
            self._compilers.release()

    def count(self) -> int:
        """Open sessions."""
        with self._lock:
            return len(self._sessions)

    def held_bytes(self) -> int:
        """What the server holds for all sessions, and for models that are being compiled."""
        return self._memory.used

    def status(self) -> tuple[SessionStatus, ...]:
        """Snapshots of all sessions."""
        now = self._clock()
        return tuple(
            SessionStatus(
                session_id=session.short_id,
                attached=session.stream is not None,
                weights_version=session.weights_version,
                batches=session.batches,
                age_s=now - session.opened,
                layers=tuple(latency.status() for latency in session.latency),
            )
            for session in self._snapshot()
        )

    def _refuse_if_not_wanted(self, place: Place) -> None:
        if place.given_up.is_set():
            raise SessionLost("the call was cancelled before its session was open")
        if self._stop.is_set():
            raise ServerUnavailable("the server is shutting down; try again when it is back")

    def _snapshot(self) -> list[SessionEntry]:
        with self._lock:
            return list(self._sessions.values())

    def _dispose(self, session: SessionEntry, reason: NpuError | None) -> None:
        if session.stream is not None:
            session.stream.cancel(reason)
        try:
            closing = self._device.worker.submit(session.session_id, session.program.close)
            closing.add_done_callback(lambda _: self._freed.set())
        except ServerUnavailable:
            log.warning("session %s: the device is closed, its program is dropped", session.short_id)

    def _reap_until_stopped(self) -> None:
        while not self._stop.wait(max(0.05, min(self._limits.lease_s / 4, 5.0))):
            if self._freed.is_set():
                # At most once a tick, however many sessions and streams have ended: it holds the
                # allocator's locks.
                self._freed.clear()
                return_free_memory()
            self.reap()
