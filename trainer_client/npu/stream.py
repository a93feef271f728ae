"""A session over the network that survives its server.

Two threads serve a session beside its user's: gRPC's sender takes operations from the journal, the session's
own reads the answers and, when the server is gone, finds it again and replays the journal. The order of the
journal makes that exact: a batch leaves it only when it is answered, an update when it is loaded, both in
order, so that confirmed weights plus the updates in front of a batch are those that it was submitted with.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import grpc
import numpy as np

from npu_wire.errors import (
    DeviceChanged,
    DeviceFault,
    InvalidInput,
    NonFiniteInput,
    NpuError,
    QuotaExceeded,
    ServerUnavailable,
    SessionLost,
    Timeout,
    Unauthenticated,
)
from npu_wire.framing import Received
from npu_wire.layer_map import (
    Array,
    Float32Array,
    Int8Array,
    LayerMap,
    input_spec_from_proto,
    layer_spec_from_proto,
)
from npu_wire.tensors import check_inputs, is_finite
from npu_wire.v1 import npu_pb2
from trainer_client.npu.arrival import Arrival
from trainer_client.npu.clock import ServerClock
from trainer_client.npu.journal import Journal, Request, SentBatch, WeightUpdate, again, named
from trainer_client.npu.session import Ranges
from trainer_client.npu.transport import Patience, Transport

log = logging.getLogger(__name__)

_FIRST_DELAY_S, _MAX_DELAY_S = 0.1, 2.0
_MAX_DEATHS = 2
_TRY_AGAIN = (ServerUnavailable, SessionLost, Timeout, QuotaExceeded)


class RemoteSession:
    """A compiled model on a server; implements `trainer_client.npu.session.Session`.

    Args:
        transport: the channel.
        revive: starts the server again if it is ours and dead.
        profile_hash: identity of the arithmetic that the connection began with.
        model: ONNX bytes; kept, to compile again elsewhere.
        ranges: activation ranges; kept.
        patience: how long to wait.
    """

    def __init__(
        self,
        transport: Transport,
        revive: Callable[[], None],
        profile_hash: str,
        model: bytes,
        ranges: Ranges,
        patience: Patience,
    ) -> None:
        self._transport = transport
        self._revive = revive
        self._profile_hash = profile_hash
        self._model = model
        self._ranges = dict(ranges)
        self._patience = patience
        self._changed = threading.Condition()
        self._journal = Journal(self._changed)
        self._layer_map: LayerMap | None = None
        self._session_id = ""
        self._call: Any = None
        self._epoch = 0
        self._clock = ServerClock(0)
        self._arrival = Arrival(transport.local)
        self._order: dict[str, int] = {}
        self._max_in_flight, self._max_bytes = 1, 0
        self._max_batch = 0
        self._version = self._batch_id = 0
        self._heard = time.monotonic()
        self._error: NpuError | None = None
        self._reported = False
        self._recovering = False
        self._closed = False
        self._open(patience.timeout_s)
        self._start_reader(None)

    @property
    def layer_map(self) -> LayerMap:
        """Inputs, layers and outputs of the program."""
        assert self._layer_map is not None
        return self._layer_map

    @property
    def way(self) -> str:
        """How tensors come from the server, in words."""
        return f"{self._transport.address}, {self._arrival.way}"

    def push_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        """Sends changed FP32 initializers, in the order of use; see `Session.push_weights`.

        Raises:
            InvalidInput, NonFiniteInput: an array that is not float32, or not finite; or what the NPU has
                against an earlier update.
            NpuError: the session cannot go on.
        """
        for name, array in tensors.items():
            if array.dtype != np.float32 or array.size == 0:
                raise InvalidInput(
                    f"weight '{name}' is {array.dtype} {array.shape}; it must be float32 and not empty"
                )
            if not is_finite(array):
                raise NonFiniteInput(
                    f"weight '{name}' holds NaN or infinity; training diverged, lower the rate"
                )
        if not tensors:
            return
        with self._changed:
            self._check_usable()
            last = len(self._order)
            ordered = {n: tensors[n] for n in sorted(tensors, key=lambda n: self._order.get(n, last))}
            self._journal.append(WeightUpdate(self._version + 1, ordered))
            self._version += 1

    def submit(self, inputs: Mapping[str, Array], taps: Collection[int]) -> SentBatch:
        """Sends one batch and returns at once; see `Session.submit`. The arrays are copied.

        Raises:
            InvalidInput: another name, dtype or shape than compiled, or a layer that does not exist.
            NpuError: the session cannot go on.
        """
        samples = check_inputs(self.layer_map.inputs, inputs, self._max_batch)
        wrong = [tap for tap in taps if not 0 <= tap < len(self.layer_map.layers)]
        if wrong:
            raise InvalidInput(
                f"tap {wrong[0]} is no layer; the program has 0 to {len(self.layer_map.layers) - 1}"
            )
        copies = {name: np.array(array) for name, array in inputs.items()}
        with self._changed:
            self._check_usable()
            self._batch_id += 1
            pending = SentBatch(self._batch_id, self._version, copies, samples, taps, self.layer_map, self)
            self._journal.append(pending)
        return pending

    def wait_for(self, batch: SentBatch, layer: int) -> Int8Array:
        """Waits for a tensor; the waiting side of `SentBatch.tensor`."""
        begin = time.monotonic()
        with self._changed:
            self._journal.raise_error_of(batch)
            while layer not in batch.tensors:
                self._check_usable()
                if self._recovering:
                    self._changed.wait()
                    self._journal.raise_error_of(batch)
                    begin = time.monotonic()
                    continue
                left = max(begin, self._heard) + self._patience.timeout_s - time.monotonic()
                if left <= 0:
                    raise Timeout(
                        f"the server at {self._transport.address} is connected but has sent nothing for "
                        f"{self._patience.timeout_s:g} s (waiting for layer {layer}); look at its log, or "
                        "connect with a larger timeout_s"
                    )
                self._changed.wait(left)
                self._journal.raise_error_of(batch)
            return batch.tensors[layer]

    def close(self) -> None:
        """Releases the session on the server; idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._call.cancel()
        self._reader.join(self._patience.timeout_s)
        self._arrival.close()
        self._transport.release(self._session_id)

    def _check_usable(self) -> None:
        """Raises what stands in the way; a server that was reported gone is looked for once more."""
        if self._closed:
            raise SessionLost("the session is closed; compile the model again")
        if self._error is None:
            return
        if self._reported and isinstance(self._error, ServerUnavailable):
            self._error = None
            self._reader.join()
            self._start_reader(ServerUnavailable("still gone when last tried"))
            return
        self._reported = True
        raise again(self._error)

    def _start_reader(self, failure: NpuError | None) -> None:
        self._recovering = failure is not None
        self._reader = threading.Thread(target=self._run, args=(failure,), name="npu-session", daemon=True)
        self._reader.start()

    def _run(self, failure: NpuError | None) -> None:
        while failure is None or self._recover(failure):
            failure = self._read()
            with self._changed:
                self._epoch += 1
                self._changed.notify_all()
                if self._closed:
                    return
                self._recovering = True
                if isinstance(failure, DeviceChanged | Unauthenticated):
                    self._give_up(failure)
                    return
                self._blame(failure)

    def _blame(self, failure: NpuError) -> None:
        """Decides what the end of a stream means for the operation that the server was at.

        An error of the server's own is the operation's fault at once, a server that is lost only when it is
        lost again: so the journal gets shorter with every second stream at the latest. Where it is empty,
        the second lost server is not looked for before there is something to do.
        """
        head = self._journal.head
        if head is not None and not isinstance(failure, ServerUnavailable | SessionLost):
            self._journal.fail_head(named(head, failure))
        elif self._journal.server_died() >= _MAX_DEATHS:
            if head is not None:
                self._journal.fail_head(
                    DeviceFault(
                        f"{head.name} of session {self._session_id[:8]} at {self._transport.address} has "
                        f"cost {_MAX_DEATHS} servers in a row their lives (the last: {failure}); it is not "
                        "sent again. The server's log may say why; the session goes on without it"
                    )
                )
            while self._journal.head is None and not self._closed:
                self._changed.wait()

    def _give_up(self, error: NpuError) -> None:
        self._error, self._reported, self._recovering = error, False, False
        self._changed.notify_all()

    def _recover(self, failure: NpuError) -> bool:
        """Finds the server again and replays the journal; False when that is not possible."""
        limit_s = self._patience.reconnect_timeout_s
        begin = time.monotonic()
        log.log(
            logging.WARNING if isinstance(failure, ServerUnavailable | SessionLost) else logging.DEBUG,
            "server at %s: %s (%s); trying for %g s to go on",
            self._transport.address,
            type(failure).__name__,
            failure,
            limit_s,
        )
        if isinstance(failure, InvalidInput):
            self._attach(new=False)  # an operation was refused; the server holds the session as it was
            return True
        delay_s = _FIRST_DELAY_S
        while not self._closed:
            left_s = begin + limit_s - time.monotonic()
            try:
                self._open(max(0.1, min(left_s, self._patience.timeout_s)))
            except _TRY_AGAIN as error:
                failure = error
            except NpuError as error:
                with self._changed:
                    self._give_up(error)
                return False
            else:
                log.warning(
                    "server at %s is back after %.1f s", self._transport.address, time.monotonic() - begin
                )
                return True
            with self._changed:
                if time.monotonic() + delay_s > begin + limit_s:
                    self._give_up(
                        ServerUnavailable(
                            f"no server at {self._transport.address} took the session in {limit_s:g} s "
                            f"({failure}); start it again and repeat the step: the session goes on then"
                        )
                    )
                    return False
                self._changed.wait(delay_s)
            delay_s = min(2 * delay_s, _MAX_DELAY_S)
        return False

    def _open(self, timeout_s: float) -> None:
        """Compiles on the server and opens the stream."""
        self._revive()
        server = self._transport.describe(timeout_s, wait_for_ready=False)
        self._check_hash(server.info.profile_hash)
        if self._session_id:
            self._transport.release(self._session_id)
        answer = self._transport.compile(self._model, self._ranges, self._patience.compile_timeout_s)
        self._session_id = answer.session_id
        layer_map = LayerMap(
            tuple(input_spec_from_proto(spec) for spec in answer.inputs),
            tuple(layer_spec_from_proto(layer) for layer in answer.layers),
            tuple(answer.outputs),
        )
        if self._layer_map is not None and layer_map.arithmetic != self._layer_map.arithmetic:
            raise DeviceChanged(
                f"the server at {self._transport.address} now compiles the model to other layers or scales "
                "than when the session began; start the same version again, or compile anew"
            )
        self._layer_map = layer_map
        parameters = dict.fromkeys(name for layer in layer_map.layers for name in layer.parameters)
        self._order = {name: position for position, name in enumerate(parameters)}
        self._max_in_flight, self._max_batch = server.max_in_flight, server.info.max_batch
        self._max_bytes = server.max_session_bytes
        self._clock = ServerClock(server.clock_offset_ns)
        self._attach(new=True)

    def _attach(self, new: bool) -> None:
        """Opens the stream and replays the journal; a new session gets the confirmed weights first."""
        with self._changed:
            self._epoch += 1
            replayed = self._journal.rewind(self.layer_map)
            self._heard = time.monotonic()
            self._arrival.close()
            self._arrival = Arrival(self._transport.local)
            self._call = self._transport.forward(self._requests(self._epoch, new))
            self._recovering = False
            self._changed.notify_all()
        if replayed and new:
            log.warning("%d unanswered batches are sent again", replayed)

    def _check_hash(self, profile_hash: str) -> None:
        if profile_hash != self._profile_hash:
            raise DeviceChanged(
                f"the NPU at {self._transport.address} has profile hash {profile_hash[:12]}…, the session "
                f"began with {self._profile_hash[:12]}…; start the server with that profile, or connect anew"
            )

    def _check_version(self, version: int) -> None:
        """A session that lives on must hold the confirmed weights, a new one those of the model."""
        if version not in (0, self._journal.confirmed.version):
            raise SessionLost(
                f"the session holds weights version {version} instead of {self._journal.confirmed.version}"
            )

    def _requests(self, epoch: int, new: bool) -> Iterator[Request]:
        """What gRPC's sender thread sends: everything in the journal that this server has not got yet."""
        attach = npu_pb2.Attach(session_id=self._session_id, shared_memory=self._arrival.wanted)
        yield npu_pb2.ForwardRequest(attach=attach)
        with self._changed:
            confirmed = self._journal.confirmed
        if new and confirmed.version:
            yield from confirmed.messages()
        while True:
            with self._changed:
                while True:
                    if self._closed or epoch != self._epoch:
                        return
                    operation = self._journal.next_to_send(self._max_in_flight)
                    if operation is not None:
                        break
                    self._changed.wait()
            for message in operation.messages():
                yield message
                if isinstance(operation, WeightUpdate) and (batch := self._early_batch(operation, epoch)):
                    yield from batch.messages()

    def _early_batch(self, update: WeightUpdate, epoch: int) -> SentBatch | None:
        with self._changed:
            if self._closed or epoch != self._epoch:
                return None
            return self._journal.early_batch(update, self._max_in_flight, self._max_bytes)

    def _read(self) -> NpuError:
        """Takes answers until the stream ends, and tells why it did."""
        try:
            for response in self._call:
                self._take(response)
        except grpc.RpcError as error:
            return self._transport.translate(error)
        except NpuError as error:
            self._call.cancel()
            return error
        return ServerUnavailable(f"the server at {self._transport.address} ended the stream")

    def _take(self, received: Received[npu_pb2.ForwardResponse]) -> None:
        arrival_ns, response = time.monotonic_ns(), received.message
        self._check_hash(response.profile_hash)
        kind = response.WhichOneof("kind")
        with self._changed:
            self._heard = time.monotonic()
            if kind == "tensor":
                batch = self._journal.current_batch(response.batch_id)
                if response.weights_version != batch.version:
                    raise DeviceFault(
                        f"batch {batch.batch_id} was computed with weights version "
                        f"{response.weights_version} instead of {batch.version}"
                    )
            elif kind == "attached":
                self._check_version(response.attached.weights_version)
            elif kind == "weights_loaded":
                self._journal.weights_loaded(response.weights_version)
            elif kind == "done":
                self._journal.batch_done(response.batch_id)
        if kind == "tensor":
            # Outside the lock: the user's thread may read earlier layers while this one is copied.
            data = self._arrival.data(received)
            whole = batch.receive(response.tensor, data, self._clock, arrival_ns)
            if whole is not None:
                with self._changed:
                    batch.tensors.setdefault(*whole)
                    self._changed.notify_all()
        elif kind == "attached":
            self._arrival.attached(response.attached)
