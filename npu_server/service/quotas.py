"""How much of the server's memory each client may hold."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from npu_wire.errors import QuotaExceeded

_WAITING_STREAMS = 8


@dataclass(frozen=True)
class Limits:
    """Quotas of a server.

    Attributes:
        max_sessions: sessions open at the same time.
        max_model_bytes: bytes of an ONNX model.
        max_in_flight: batches of a session sent and not yet answered.
        max_session_bytes: bytes that the server holds for a session, its streams together: what comes in and
            is not computed yet, and answers that are not read. A weight update or a batch may be as large.
        max_server_bytes: the same for all sessions together, and for models that are being compiled.
        lease_s: seconds without a sign of life after which a session is released.
        stall_s: seconds that a client may keep the server waiting: for a call's first message, for the rest
            of a model, weight update or tensor, and while it does not read its answers.
    """

    max_sessions: int
    max_model_bytes: int
    max_in_flight: int
    max_session_bytes: int
    max_server_bytes: int
    lease_s: float
    stall_s: float


class Memory:
    """What the server holds for its clients: models and tensors that come in, answers that are not read.

    Each account has a share of its own; beyond it, all draw from one pool. So a server that is full of what
    some clients have sent and abandoned still has room for the others.

    Args:
        max_bytes: for all accounts.
        accounts: how many there may be; half of the memory is theirs in equal shares, half the pool.
        patience_s: how long `Ledger.take` waits for the pool.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        max_bytes: int,
        accounts: int,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_bytes = max_bytes
        self.share = max_bytes // 2 // accounts
        self.pool = max_bytes - self.share * accounts
        self.patience_s = patience_s
        self.changed = threading.Condition()
        self.clock = clock
        self.pooled = 0
        self.used = 0


class Account:
    """What one session holds, all its streams together.

    Args:
        memory: the server's.
        max_bytes: most that it may hold.
    """

    def __init__(self, memory: Memory, max_bytes: int) -> None:
        self.memory = memory
        self.max_bytes = max_bytes
        self.used = 0
        self._waiting_streams = 0

    def queue(self) -> None:
        """Counts a stream that waits for the device to be done with the session's earlier ones.

        Raises:
            QuotaExceeded: too many do.
        """
        with self.memory.changed:
            if self._waiting_streams >= _WAITING_STREAMS:
                raise QuotaExceeded(
                    f"{self._waiting_streams} streams of this session wait for the device; attach again later"
                )
            self._waiting_streams += 1

    def leave_queue(self) -> None:
        """Its turn has come."""
        with self.memory.changed:
            self._waiting_streams -= 1

    def change(self, count: int) -> None:
        """Books; the caller holds `memory.changed`."""
        memory = self.memory
        memory.pooled += self._beyond_share(self.used + count) - self._beyond_share(self.used)
        memory.used += count
        self.used += count
        if count < 0:
            memory.changed.notify_all()

    def fits(self, count: int) -> bool:
        """Whether the server has so much room for this account; the caller holds `memory.changed`."""
        memory = self.memory
        more = self._beyond_share(self.used + count) - self._beyond_share(self.used)
        return more == 0 or memory.pooled + more <= memory.pool

    def _beyond_share(self, used: int) -> int:
        return max(0, used - self.memory.share)


class Ledger:
    """What one stream, or one Compile call, holds of its session's account.

    Args:
        account: the session's.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._changed = account.memory.changed
        self._held = 0
        self._closed = False

    def take(self, count: int) -> bool:
        """Books bytes that have come, and makes the sender wait while there is no room for them.

        Returns:
            False when the ledger was closed instead.

        Raises:
            QuotaExceeded: the server is full with what others sent and stays so.
        """
        account = self._account
        with self._changed:
            while not self._closed and account.used + count > account.max_bytes:
                self._changed.wait()
            memory = account.memory
            end = memory.clock() + memory.patience_s
            while not self._closed and not account.fits(count):
                left_s = end - memory.clock()
                if left_s <= 0:
                    raise QuotaExceeded(
                        f"the server holds {memory.used} bytes for its clients and has no room for {count} "
                        "more; try again later, or start it with a larger --max-server-bytes"
                    )
                self._changed.wait(left_s)
            if not self._closed:
                self._held += count
                account.change(count)
            return not self._closed

    def add(self, count: int) -> None:
        """Books bytes that the server itself made; never waits."""
        with self._changed:
            if not self._closed:
                self._held += count
                self._account.change(count)

    def give(self, count: int) -> None:
        """Bytes that are held no more."""
        with self._changed:
            if not self._closed:
                self._held -= count
                self._account.change(-count)

    def is_crowded(self) -> bool:
        """Whether the session, or the server, holds as much as it may."""
        with self._changed:
            account = self._account
            return account.used >= account.max_bytes or not account.fits(1)

    def close(self) -> None:
        """Gives everything back and lets go of who waits; idempotent."""
        with self._changed:
            if not self._closed:
                self._closed = True
                self._account.change(-self._held)
                self._changed.notify_all()
