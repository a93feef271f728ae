"""What a session has asked for and not been answered yet, in order; replayed when its server comes back."""

import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from npu_wire.errors import DeviceFault, InvalidInput, NpuError
from npu_wire.framing import Slice
from npu_wire.layer_map import Array, Float32Array, Int8Array, LayerMap
from npu_wire.tensors import OutgoingTensor, TensorAssembler, TensorHeader, input_header
from npu_wire.v1 import npu_pb2
from trainer_client.npu.clock import ServerClock
from trainer_client.npu.session import LayerTiming

Request = npu_pb2.ForwardRequest | Slice
"""What is sent."""

_CHUNK_BYTES = 2**19
"""Of weights: so that a batch waits for little while they are on their way."""

_SMALL_BYTES, _TOGETHER_BYTES = 2**15, 2**17
"""Tensors up to the first size travel together, in messages up to the second: each message costs time."""


class WeightUpdate:
    """Changed initializers; owns its arrays.

    Args:
        version: the weights version that it leads to.
        tensors: name -> float32 values, in the order in which they travel.
    """

    def __init__(self, version: int, tensors: Mapping[str, Float32Array]) -> None:
        self.version = version
        self.tensors = tensors
        self.name = f"weights version {version}"

    def messages(self) -> Iterator[Request]:
        """The update on the wire; between any two messages a batch may follow."""
        update = npu_pb2.WeightUpdate(weights_version=self.version, names=self.tensors)
        yield npu_pb2.ForwardRequest(update=update)
        carrier, carried = npu_pb2.WeightChunk(weights_version=self.version), 0
        for name, array in self.tensors.items():
            outgoing = OutgoingTensor(name, array)
            if array.nbytes <= _SMALL_BYTES:
                outgoing.write(carrier.small.add(), 0)
                carried += array.nbytes
                if carried < _TOGETHER_BYTES:
                    continue
                yield npu_pb2.ForwardRequest(weight=carrier)
                carrier, carried = npu_pb2.WeightChunk(weights_version=self.version), 0
                continue
            for offset in outgoing.offsets(_CHUNK_BYTES):
                data = outgoing.data(offset, _CHUNK_BYTES)
                yield Slice(npu_pb2.ForwardRequest(), carrier, outgoing.chunk(offset), data)
                carrier, carried = npu_pb2.WeightChunk(weights_version=self.version), 0
        if carried:
            yield npu_pb2.ForwardRequest(weight=carrier)

    @property
    def largest_bytes(self) -> int:
        """Of one tensor."""
        return max(array.nbytes for array in self.tensors.values())


class Waiter(Protocol):
    """Who knows how long to wait for a tensor."""

    def wait_for(self, batch: "SentBatch", layer: int) -> Int8Array:
        """Returns the tensor or raises."""
        ...


class SentBatch:
    """A batch with the answers that have come; implements `trainer_client.npu.session.PendingBatch`.

    Args:
        batch_id: its number in the session.
        version: the weights version to run it with.
        inputs: arrays by name; owned.
        samples: how many they hold.
        taps: positions of the layers to answer with.
        layer_map: of the session.
        waiter: the session.
    """

    def __init__(
        self,
        batch_id: int,
        version: int,
        inputs: Mapping[str, Array],
        samples: int,
        taps: Collection[int],
        layer_map: LayerMap,
        waiter: Waiter,
    ) -> None:
        self.batch_id = batch_id
        self.name = f"batch {batch_id}"
        self.version = version
        self.taps = layer_map.output_layers.union(taps)
        self.tensors: dict[int, Int8Array] = {}
        self.error: NpuError | None = None
        self._inputs = inputs
        self._samples = samples
        self._layer_map = layer_map
        self._waiter = waiter
        self._timings: list[LayerTiming] = []
        self._assembler: TensorAssembler | None = None
        self._assembling = -1
        self._sent_ns = 0

    def tensor(self, layer: int) -> Int8Array:
        """Waits for a layer's output; see `PendingBatch.tensor`."""
        if layer not in self.taps:
            raise InvalidInput(f"layer {layer} was not tapped by this batch; pass it to submit(taps=...)")
        return self._waiter.wait_for(self, layer)

    def timings(self) -> Sequence[LayerTiming]:
        """Timings of the tensors that have arrived so far."""
        return tuple(self._timings)

    def messages(self) -> Iterator[Request]:
        """The batch on the wire."""
        self._sent_ns = time.monotonic_ns()
        taps = sorted(self.taps)
        for spec in self._layer_map.inputs:
            header = input_header(spec, self._samples)
            outgoing = OutgoingTensor(spec.name, self._inputs[spec.name], header.layout)
            for offset in outgoing.offsets():
                carrier = npu_pb2.BatchChunk(batch_id=self.batch_id, weights_version=self.version, taps=taps)
                taps = []
                yield Slice(npu_pb2.ForwardRequest(), carrier, outgoing.chunk(offset), outgoing.data(offset))

    @property
    def input_bytes(self) -> int:
        """Of all inputs."""
        return sum(array.nbytes for array in self._inputs.values())

    def begin(self, layer_map: LayerMap) -> None:
        """Goes to a new server: a half-received tensor is forgotten, whole ones stay.

        Args:
            layer_map: of that server; it may lay tensors out in another order.
        """
        self._layer_map = layer_map
        self._assembler = None

    def receive(
        self,
        message: npu_pb2.LayerTensor,
        data: memoryview | None,
        clock: ServerClock,
        arrival_ns: int,
    ) -> tuple[int, Int8Array] | None:
        """Takes a slice of a layer's output and returns the layer with its tensor when that is whole.

        Raises:
            DeviceFault: a layer that was not tapped.
            InvalidInput: a slice that is not of the tensor that the layer map promises.
        """
        layer = message.layer
        if layer not in self.taps:
            raise DeviceFault(
                f"the server answered batch {self.batch_id} with layer {layer}, which was not tapped"
            )
        if self._assembler is None:
            spec = self._layer_map.layers[layer].output
            expected = TensorHeader(spec.name, np.dtype(np.int8), (self._samples, *spec.shape), spec.layout)
            self._assembler = TensorAssembler(message.chunk, expected.nbytes, expected)
            self._assembling = layer
        elif layer != self._assembling:
            raise DeviceFault(f"the server sent layer {layer} in the middle of layer {self._assembling}")
        clock.observe(self._sent_ns, message.start_ns, message.end_ns, arrival_ns)
        array = self._assembler.add(message.chunk, data)
        if array is None:
            return None
        self._assembler = None
        if layer not in self.tensors:
            self._timings.append(
                LayerTiming(layer, clock.ours(message.start_ns), clock.ours(message.end_ns), arrival_ns)
            )
        return layer, array


Operation = WeightUpdate | SentBatch


class Journal:
    """Operations in order, the first `_sent` of them on their way to the current server.

    All methods expect `changed` to be held.

    Args:
        changed: the session's condition.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self.changed = changed
        self.confirmed = WeightUpdate(0, {})
        self._operations: deque[Operation] = deque()
        self._sent = 0
        self._refusal: NpuError | None = None
        self._refusal_told = True
        self._suspect: Operation | None = None
        self._deaths = 0

    def append(self, operation: Operation) -> None:
        """Adds an operation; after an update that failed, batches fail until there is another one.

        Raises:
            NpuError: an update, while nobody knows yet that an earlier one failed: it was made on top of it.
        """
        if isinstance(operation, WeightUpdate):
            if self._refusal is not None and not self._refusal_told:
                self._refusal_told = True
                raise again(self._refusal)
            self._refusal = None
        elif self._refusal is not None:
            operation.error = self._refusal
            return
        self._operations.append(operation)
        self.changed.notify_all()

    def raise_error_of(self, batch: SentBatch) -> None:
        """Raises what went wrong with a batch.

        Raises:
            NpuError: its own error, or that of the weights it was to run with.
        """
        if batch.error is not None:
            self._refusal_told |= batch.error is self._refusal
            raise again(batch.error)

    @property
    def head(self) -> Operation | None:
        """What the server is at, or will be at next."""
        return self._operations[0] if self._operations else None

    def rewind(self, layer_map: LayerMap) -> int:
        """Makes everything unsent, for a new server, and tells how many batches that are."""
        self._sent = 0
        batches = [operation for operation in self._operations if isinstance(operation, SentBatch)]
        for batch in batches:
            batch.begin(layer_map)
        return len(batches)

    def next_to_send(self, max_in_flight: int) -> Operation | None:
        """Marks the next operation as sent and returns it; None when there is none or the window is full.

        After a server has died the window is one operation, so that a second death has one cause.
        """
        if self._sent == len(self._operations) or (self._deaths and self._sent):
            return None
        operation = self._operations[self._sent]
        in_flight = sum(isinstance(self._operations[i], SentBatch) for i in range(self._sent))
        if isinstance(operation, SentBatch) and in_flight >= max_in_flight:
            return None
        self._sent += 1
        return operation

    def early_batch(self, update: WeightUpdate, max_in_flight: int, max_bytes: int) -> SentBatch | None:
        """The batch that may be sent while `update` is: one, next behind it, and room for both on the server.

        Marks it as sent. After a server has died there is none; see `next_to_send`.
        """
        is_next = 0 < self._sent < len(self._operations) and self._operations[self._sent - 1] is update
        batch = self._operations[self._sent] if is_next else None
        if not isinstance(batch, SentBatch) or batch.input_bytes + update.largest_bytes > max_bytes:
            return None
        operation = self.next_to_send(max_in_flight)
        assert operation in (batch, None)
        return batch if operation is batch else None

    def current_batch(self, batch_id: int) -> SentBatch:
        """The batch that is being answered: the next one, and that may be while its update still loads.

        Raises:
            DeviceFault: the server answers another one.
        """
        position = 1 if isinstance(self.head, WeightUpdate) else 0
        batch = self._operations[position] if position < self._sent else None
        if not isinstance(batch, SentBatch) or batch.batch_id != batch_id:
            raise DeviceFault(f"the server answered batch {batch_id}, which is not the next one")
        return batch

    def batch_done(self, batch_id: int) -> None:
        """Removes an answered batch.

        Raises:
            DeviceFault: it is not the next one, or a tensor of it or the answer to its update is missing.
        """
        batch = self.current_batch(batch_id)
        if batch is not self.head:
            raise DeviceFault(f"the server ended batch {batch_id} before it had loaded its weights")
        missing = batch.taps - batch.tensors.keys()
        if missing:
            raise DeviceFault(f"the server ended batch {batch_id} without layer {min(missing)}")
        self._remove_head()

    def weights_loaded(self, version: int) -> None:
        """Folds an update into the confirmed weights.

        Raises:
            DeviceFault: it is not the next one.
        """
        head = self.head
        if self._sent and isinstance(head, WeightUpdate) and head.version == version:
            self.confirmed = WeightUpdate(version, {**self.confirmed.tensors, **head.tensors})
            self._remove_head()
        elif version != self.confirmed.version:  # which a new server confirms once more
            raise DeviceFault(f"the server loaded weights version {version}, which is not the next one")

    def server_died(self) -> int:
        """Counts the servers that were lost at the head, and returns how many there were."""
        if self._suspect is not self.head:
            self._suspect, self._deaths = self.head, 0
        self._deaths += 1
        return self._deaths

    def fail_head(self, error: NpuError) -> None:
        """Blames the operation that the server was at, so that the others can go on.

        All that is queued behind an update was made on top of it and fails with it.
        """
        failed = list(self._operations)
        if isinstance(failed[0], WeightUpdate):
            self._refusal, self._refusal_told = error, False
        else:
            failed = failed[:1]
        for operation in failed:
            if isinstance(operation, SentBatch):
                operation.error = error
            self._remove_head()

    def _remove_head(self) -> None:
        self._operations.popleft()
        self._sent = max(0, self._sent - 1)
        self._suspect, self._deaths = None, 0
        self.changed.notify_all()


def again(error: NpuError) -> NpuError:
    """A fresh copy: one exception object raised twice would gather both tracebacks."""
    return type(error)(*error.args)


def named(operation: Operation, error: NpuError) -> NpuError:
    """The error, with the words that a refused update needs."""
    if not isinstance(operation, WeightUpdate):
        return error
    return type(error)(
        f"{operation.name} is not loaded: {error}. The NPU keeps the weights that it had; push repaired ones "
        "and repeat the step"
    )
