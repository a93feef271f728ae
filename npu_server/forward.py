"""One Forward stream: requests in, device jobs, answers out.

Three threads meet here. The stream's reader checks requests and queues jobs; the device's worker runs them;
the handler's thread turns results into messages. The queue of answers has no length of its own: the number of
batches in flight bounds it, so a slow client fills its own share of memory and never holds up the device.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import grpc
import numpy as np

from npu_server.backends.base import LayerTensor
from npu_server.intake import Batch, Intake, WeightUpdate
from npu_server.sessions import Limits, Session
from npu_server.telemetry import Telemetry
from npu_server.worker import DeviceWorker, Steps, one_step
from npu_wire.errors import DeviceFault, InvalidInput, NpuError, QuotaExceeded, ServerUnavailable
from npu_wire.tensors import OutgoingTensor
from npu_wire.v1 import npu_pb2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Attached:
    weights_version: int


@dataclass(frozen=True)
class _Loaded:
    weights_version: int
    duration_ns: int


@dataclass(frozen=True)
class _Tensor:
    batch: Batch
    tensor: LayerTensor


@dataclass(frozen=True)
class _Done:
    batch: Batch
    queued_ns: int
    device_ns: int


_Answer = _Attached | _Loaded | _Tensor | _Done


class ForwardStream:
    """The open stream of a session.

    Args:
        session: the session that it runs.
        worker: the device's thread.
        limits: quotas.
        max_batch: most samples of a batch.
        profile_hash: sent with every answer.
        telemetry: counters.
    """

    def __init__(
        self,
        session: Session,
        worker: DeviceWorker,
        limits: Limits,
        max_batch: int,
        profile_hash: str,
        telemetry: Telemetry,
    ) -> None:
        self._session = session
        self._worker = worker
        self._limits = limits
        self._max_batch = max_batch
        self._profile_hash = profile_hash
        self._telemetry = telemetry
        self._answers: queue.SimpleQueue[_Answer | NpuError | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._in_flight = 0
        # Blocks the reader, and so by flow control the client, while this many updates wait for the device.
        self._update_slots = threading.BoundedSemaphore(limits.max_in_flight)

    def run(self, requests: Iterable[npu_pb2.ForwardRequest]) -> Iterator[npu_pb2.ForwardResponse]:
        """Serves the stream after its attach message, until the client ends it or an error does.

        Raises:
            NpuError: the error that ends the stream, after the answers to everything before it.
        """
        threading.Thread(
            target=self._read, args=(iter(requests),), name="npu-forward-reader", daemon=True
        ).start()
        while (answer := self._answers.get()) is not None:
            if isinstance(answer, NpuError):
                try:
                    raise answer
                finally:
                    del answer
            yield from self._encode(answer)

    def cancel(self, error: NpuError | None = None) -> None:
        """Ends the stream now; the device stops at the next layer."""
        if error is not None:
            # Its frames hold this stream, and the stream's queue the error: a cycle around the whole program.
            error.__traceback__ = None
        self._ended.set()
        self._answers.put(error)

    def finish(self, error: NpuError | None) -> None:
        """Ends the stream after the jobs that are queued."""
        try:
            self._submit(one_step(lambda: self.cancel(error)))
        except ServerUnavailable as closed:
            self.cancel(error or closed)

    def _submit(self, job: Steps[None]) -> None:
        self._worker.submit_steps(self._session.session_id, self._guard(job))

    def _guard(self, job: Steps[None]) -> Steps[None]:
        """The job's steps, for as long as the stream is open."""
        try:
            if self._ended.is_set():
                return
            for _ in job:
                yield
                if self._ended.is_set():
                    return
        except NpuError as error:
            self.cancel(error)
        except Exception:
            log.exception("session %s: the device failed", self._session.short_id)
            self.cancel(
                DeviceFault("the device failed while it worked on this session; the server's log says why")
            )

    def _read(self, requests: Iterator[npu_pb2.ForwardRequest]) -> None:
        try:
            intake = self._attach()
            for request in requests:
                if self._ended.is_set():
                    return
                self._telemetry.received(len(request.weight.chunk.data) + len(request.batch.chunk.data))
                work = intake.take(request)
                if isinstance(work, WeightUpdate):
                    self._queue_update(work)
                elif isinstance(work, Batch):
                    self._queue_batch(work)
            self.finish(None)
        except grpc.RpcError:
            self.cancel()
        except NpuError as error:
            self.finish(error)
        except Exception:
            log.exception("session %s: reading requests failed", self._session.short_id)
            self.finish(DeviceFault("the server failed while it read this stream; its log says why"))

    def _attach(self) -> Intake:
        # Through the worker, so that whatever an earlier stream of the session has left there is over.
        version = self._worker.submit(
            self._session.session_id, lambda: self._session.weights_version
        ).result()
        self._answers.put(_Attached(version))
        return Intake(self._session.layer_map, self._max_batch, self._limits.max_model_bytes, version)

    def _queue_update(self, update: WeightUpdate) -> None:
        while not self._update_slots.acquire(timeout=1.0):
            if self._ended.is_set():
                return

        def load() -> None:
            begin = time.monotonic_ns()
            self._session.program.load_weights(update.tensors)
            self._session.weights_version = update.weights_version
            self._update_slots.release()
            self._answers.put(_Loaded(update.weights_version, time.monotonic_ns() - begin))

        self._submit(one_step(load))

    def _queue_batch(self, batch: Batch) -> None:
        with self._lock:
            if self._in_flight >= self._limits.max_in_flight:
                raise QuotaExceeded(
                    f"batch {batch.batch_id} came while {self._in_flight} batches were unanswered; "
                    f"this server allows {self._limits.max_in_flight} in flight"
                )
            self._in_flight += 1
        queued = time.monotonic_ns()
        self._submit(self._compute(batch, queued))

    def _compute(self, batch: Batch, queued: int) -> Steps[None]:
        """Runs a batch, a layer a step; the time of other sessions' steps in between does not count."""
        begin = resumed = time.monotonic_ns()
        device_ns = 0
        for tensor in self._session.program.forward(batch.data, batch.taps):
            if tensor is not None:
                self._check(batch, tensor)
                self._telemetry.layer(self._session.latency[tensor.layer], tensor.end_ns - tensor.start_ns)
                self._answers.put(_Tensor(batch, tensor))
            device_ns += time.monotonic_ns() - resumed
            yield
            resumed = time.monotonic_ns()
        device_ns += time.monotonic_ns() - resumed
        self._session.batches += 1
        self._telemetry.batch(begin - queued, device_ns)
        self._answers.put(_Done(batch, begin - queued, device_ns))

    def _check(self, batch: Batch, tensor: LayerTensor) -> None:
        last = len(self._session.layer_map.layers) - 1
        if tensor.layer not in batch.taps and tensor.layer != last:
            raise DeviceFault(f"the backend answered with layer {tensor.layer}, which was not tapped")
        spec = self._session.layer_map.layers[tensor.layer].output
        shape = (batch.data.shape[0], *spec.shape)
        if tensor.data.dtype != np.int8 or tensor.data.shape != shape:
            raise DeviceFault(
                f"the backend answered layer '{spec.name}' with {tensor.data.dtype} {tensor.data.shape} "
                f"where its layer map promises int8 {shape}"
            )

    def _encode(self, answer: _Answer) -> Iterator[npu_pb2.ForwardResponse]:
        if isinstance(answer, _Tensor):
            yield from self._encode_tensor(answer.batch, answer.tensor)
            return
        response = npu_pb2.ForwardResponse(profile_hash=self._profile_hash)
        if isinstance(answer, _Attached):
            response.weights_version = answer.weights_version
            response.attached.weights_version = answer.weights_version
        elif isinstance(answer, _Loaded):
            response.weights_version = answer.weights_version
            response.weights_loaded.duration_ns = answer.duration_ns
        else:
            with self._lock:
                self._in_flight -= 1
            response.weights_version = answer.batch.weights_version
            response.batch_id = answer.batch.batch_id
            response.done.queued_ns = answer.queued_ns
            response.done.device_ns = answer.device_ns
        yield response

    def _encode_tensor(self, batch: Batch, tensor: LayerTensor) -> Iterator[npu_pb2.ForwardResponse]:
        spec = self._session.layer_map.layers[tensor.layer].output
        outgoing = OutgoingTensor(spec.name, tensor.data, spec.layout)
        for offset in outgoing.offsets():
            response = npu_pb2.ForwardResponse(
                profile_hash=self._profile_hash,
                weights_version=batch.weights_version,
                batch_id=batch.batch_id,
            )
            message = response.tensor
            message.layer = tensor.layer
            message.start_ns = tensor.start_ns
            message.end_ns = tensor.end_ns
            outgoing.write(message.chunk, offset)
            yield response
        self._telemetry.sent(outgoing.header.nbytes)


def session_id_of(request: npu_pb2.ForwardRequest | None) -> str:
    """The session that a stream's first message attaches to.

    Raises:
        InvalidInput: it is no attach message.
    """
    if request is None or request.WhichOneof("kind") != "attach":
        raise InvalidInput("the first message of a Forward stream must be attach")
    return request.attach.session_id
