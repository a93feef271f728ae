"""One Forward stream: requests in, device jobs, answers out.

Three threads meet here. The stream's reader checks requests and queues jobs; the device's worker runs them;
the handler's thread turns results into messages. The queue of answers has no length of its own: what lies
in it is booked, and a batch stops between two layers while there is no room for more. So a slow client fills
its own share of memory and never holds up the device.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import numpy as np

from npu_server.seam import Awaited, LayerTensor
from npu_server.service.agenda import Agenda, Job
from npu_server.service.answers import Answer, Attached, Computed, Done, Encoder, Loaded, Message
from npu_server.service.device import Device
from npu_server.service.intake import Batch, Intake, UpdateBegun, Weights
from npu_server.service.loading import Loading
from npu_server.service.outbox import Outbox
from npu_server.service.quotas import Ledger, Limits
from npu_server.service.rendezvous import StreamMemory
from npu_server.service.requests import Requests
from npu_server.service.sessions import SessionEntry
from npu_server.service.stalls import StallWatch
from npu_server.telemetry import Telemetry
from npu_wire.errors import (
    DeviceFault,
    InvalidInput,
    NpuError,
    QuotaExceeded,
    ServerUnavailable,
    SessionLost,
)
from npu_wire.framing import Received
from npu_wire.v1 import npu_pb2

log = logging.getLogger(__name__)

# Time for a client to hear why its stream ends.
_FAREWELL_S = 1.0


@dataclass(frozen=True)
class _Queued:
    batch: Batch
    since_ns: int


@dataclass(frozen=True)
class _End:
    error: NpuError | None


_Item = Loading | _Queued | _End


class ForwardStream:
    """The open stream of a session.

    Args:
        session: the session that it runs.
        device: the NPU.
        limits: quotas.
        telemetry: counters.
        stalls: ends the call when its client does not read the end.
        hang_up: ends the call at once and without a word.
        shared: memory that the client may have in common with this process.
    """

    def __init__(
        self,
        session: SessionEntry,
        device: Device,
        limits: Limits,
        telemetry: Telemetry,
        stalls: StallWatch,
        hang_up: Callable[[], object],
        shared: StreamMemory,
    ) -> None:
        self._session = session
        self._worker = device.worker
        self._limits = limits
        self._max_batch = device.capabilities.max_batch
        self._encoder = Encoder(session.layer_map, device.capabilities.profile_hash, shared)
        self._telemetry = telemetry
        self._stalls = stalls
        self._hang_up = hang_up
        self._shared = shared
        self._outbox: Outbox[Answer] = Outbox()
        self._ledger = Ledger(session.account)
        self._ended = threading.Event()
        self._over = False
        self._lock = threading.Lock()
        self._in_flight = 0
        self._unread = 0
        self._agenda: Agenda[_Item] = Agenda(device.worker, session.session_id, self)
        self._loading: Loading | None = None  # whose tensors are on their way
        # Blocks the reader, and so by flow control the client, while this many updates wait for the device.
        self._update_slots = threading.BoundedSemaphore(limits.max_in_flight)

    def run(self, requests: Requests[Received[npu_pb2.ForwardRequest]]) -> Iterator[Message]:
        """Serves the stream after its attach message, until the client ends it or an error does.

        Raises:
            NpuError: the error that ends the stream, after the answers to everything before it.
        """
        threading.Thread(target=self._read, args=(requests,), name="npu-forward-reader", daemon=True).start()
        try:
            while (answer := self._outbox.get()) is not None:
                yield from self._send(answer)
                del answer
        finally:
            self._over = True
            self._shared.close()

    def cancel(self, error: NpuError | None = None) -> None:
        """Ends the stream now and frees what it holds, also when its client does not read."""
        self._stop()
        self._outbox.drop(error)
        self._ledger.close()
        if not self._over:
            self._stalls.after(_FAREWELL_S, self._hang_up)

    def hang_up(self) -> None:
        """Ends the call now, whether its client has read the end or not."""
        self._hang_up()

    def finish(self, error: NpuError | None) -> None:
        """Ends the stream after what is queued; an update that is not complete never will be."""
        if self._loading is not None:
            self._loading.abandon(error)
        try:
            self._agenda.add(_End(error))
        except ServerUnavailable as closed:
            self._end(error or closed)

    def _end(self, error: NpuError | None) -> None:
        """Ends the stream after the answers that are there."""
        self._stop()
        self._outbox.end(error)

    def _stop(self) -> None:
        """Takes no more from the device, which stops at the next layer."""
        self._ended.set()
        self._agenda.stop()

    def perform(self, item: _Item) -> Job:
        """Works on an update, a batch, or the stream's end; see `npu_server.service.agenda`."""
        try:
            if isinstance(item, Loading):
                yield from self._load(item)
            elif isinstance(item, _Queued):
                yield from self._compute(item, None)
            else:
                self._end(item.error)
        except NpuError as error:
            self._end(error)
        except Exception:
            log.exception("session %s: the device failed", self._session.short_id)
            self._end(
                DeviceFault("the device failed while it worked on this session; the server's log says why")
            )

    def is_crowded(self) -> bool:
        """Whether answers lie unread and there is no room for more; one layer's always have room."""
        return self._unread > 0 and (
            self._unread >= self._limits.max_session_bytes or self._ledger.is_crowded()
        )

    def _put(self, batch: Batch, tensor: LayerTensor, weights_version: int) -> None:
        size = tensor.data.nbytes
        with self._lock:
            self._unread += size
        self._ledger.add(size)
        self._outbox.put(Computed(batch, tensor, weights_version))

    def _has_been_read(self, size: int) -> None:
        self._ledger.give(size)
        with self._lock:
            self._unread -= size
        try:
            self._agenda.wake()
        except ServerUnavailable as closed:
            self._end(closed)

    def _read(self, requests: Requests[Received[npu_pb2.ForwardRequest]]) -> None:
        requests.on_stall(self._stalled)
        try:
            intake = self._attach()
        except NpuError as error:
            self._end(error)
            return
        try:
            for request in requests:
                if self._ended.is_set():
                    return
                work = intake.take(request)
                requests.awaited = intake.incomplete
                self._telemetry.received(intake.size)
                if not self._ledger.take(intake.size):
                    return
                if isinstance(work, UpdateBegun):
                    self._begin_update(work)
                elif isinstance(work, Weights):
                    assert self._loading is not None
                    self._loading.put(work.tensors)
                    self._agenda.wake()
                elif isinstance(work, Batch):
                    self._queue_batch(work)
            self.finish(None)
        except grpc.RpcError as error:
            # gRPC keeps it in the call that its frames hold: a cycle around this stream.
            error.__traceback__ = None
            self.cancel()
        except NpuError as error:
            self.finish(error)
        except Exception:
            log.exception("session %s: reading requests failed", self._session.short_id)
            self.finish(DeviceFault("the server failed while it read this stream; its log says why"))

    def _stalled(self) -> None:
        self.cancel(
            SessionLost(
                "the client stopped in the middle of a weight update or a batch for "
                f"{self._limits.stall_s:g} s; attach again"
            )
        )

    def _attach(self) -> Intake:
        session = self._session

        def version() -> int:
            session.account.leave_queue()
            return session.weights_version

        session.account.queue()
        # Through the worker, so that whatever an earlier stream of the session has left there is over.
        current = self._worker.submit(session.session_id, version).result()
        self._outbox.put(Attached(current))
        parameters, largest = session.program.parameters, self._limits.max_session_bytes
        return Intake(session.layer_map, parameters, self._max_batch, largest, current)

    def _begin_update(self, update: UpdateBegun) -> None:
        while not self._update_slots.acquire(timeout=1.0):
            if self._ended.is_set():
                return
        self._loading = Loading(update.weights_version, update.names)
        self._agenda.add(self._loading)

    def _load(self, update: Loading) -> Job:
        """Loads weights as they come, and does a batch that waits for them meanwhile."""
        update.begin(self._session.program)
        while not update.loaded:
            queued = self._agenda.take(_Queued)
            if queued is not None:
                yield from self._compute(queued, update)
            elif update.is_given_up:
                return
            else:
                yield from self._take_weight(update)

    def _take_weight(self, update: Loading) -> Job:
        """Takes the next tensor of an update, or waits for it."""
        if not update.has_arrived:
            yield True
            return
        self._ledger.give((yield from update.take()))
        if update.loaded:
            self._session.weights_version = update.version
            self._update_slots.release()
            self._outbox.put(Loaded(update.version, update.duration_ns))

    def _queue_batch(self, batch: Batch) -> None:
        with self._lock:
            if self._in_flight >= self._limits.max_in_flight:
                raise QuotaExceeded(
                    f"batch {batch.batch_id} came while {self._in_flight} batches were unanswered; "
                    f"this server allows {self._limits.max_in_flight} in flight"
                )
            self._in_flight += 1
        self._agenda.add(_Queued(batch, time.monotonic_ns()))

    def _compute(self, queued: _Queued, update: Loading | None) -> Job:
        """Runs a batch, a layer a step, with the session's weights or those of an update on its way."""
        batch, watch = queued.batch, _Stopwatch()
        queued_ns = time.monotonic_ns() - queued.since_ns
        weights = self._session.program if update is None else update
        version = self._session.weights_version if update is None else update.version
        if version != batch.weights_version:
            raise DeviceFault(f"batch {batch.batch_id} met weights version {version} at the device")
        tensors = weights.forward(batch.inputs, batch.wanted)
        while True:
            try:
                tensor = next(tensors)
                if isinstance(tensor, LayerTensor):
                    self._check(batch, tensor)
            except StopIteration:
                break
            except Exception:
                # The update came first, and so do its answer and whatever the device has against it.
                while update is not None and not (update.loaded or update.is_given_up):
                    yield from self._take_weight(update)
                raise
            watch.stop()
            if isinstance(tensor, Awaited):
                assert update is not None
                if update.is_given_up:
                    raise update.why_given_up()
                yield from self._take_weight(update)
            else:
                if tensor is not None:
                    latency = self._session.latency[tensor.layer]
                    self._telemetry.layer(latency, tensor.end_ns - tensor.start_ns)
                    self._put(batch, tensor, version)
                yield False
            watch.go_on()
        device_ns = watch.stop()
        self._session.batches += 1
        self._telemetry.batch(queued_ns, device_ns)
        self._ledger.give(batch.nbytes)
        self._outbox.put(Done(batch, queued_ns, device_ns))

    def _check(self, batch: Batch, tensor: LayerTensor) -> None:
        if tensor.layer not in batch.wanted:
            raise DeviceFault(f"the backend answered with layer {tensor.layer}, which was not tapped")
        spec = self._session.layer_map.layers[tensor.layer].output
        shape = (batch.samples, *spec.shape)
        if tensor.data.dtype != np.int8 or tensor.data.shape != shape:
            raise DeviceFault(
                f"the backend answered layer '{spec.name}' with {tensor.data.dtype} {tensor.data.shape} "
                f"where its layer map promises int8 {shape}"
            )

    def _send(self, answer: Answer) -> Iterator[Message]:
        if isinstance(answer, Done):
            with self._lock:
                self._in_flight -= 1
        for message in self._encoder.messages(answer):
            yield message
            if self._outbox.dropped:
                return
        if isinstance(answer, Computed):
            self._telemetry.sent(answer.tensor.data.nbytes)
            self._has_been_read(answer.tensor.data.nbytes)


class _Stopwatch:
    """A job's own time at the device, in nanoseconds; it runs from the beginning."""

    def __init__(self) -> None:
        self._total_ns = 0
        self._since_ns = time.monotonic_ns()

    def stop(self) -> int:
        """Other sessions' steps do not count; tells the time so far."""
        self._total_ns += time.monotonic_ns() - self._since_ns
        return self._total_ns

    def go_on(self) -> None:
        """Counts again."""
        self._since_ns = time.monotonic_ns()


def attach_of(first: Received[npu_pb2.ForwardRequest] | None) -> npu_pb2.Attach:
    """What a stream begins with.

    Raises:
        InvalidInput: it is no attach message.
    """
    if first is None or first.message.WhichOneof("kind") != "attach":
        raise InvalidInput("the first message of a Forward stream must be attach")
    return first.message.attach
