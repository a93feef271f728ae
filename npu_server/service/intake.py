"""Checks the requests of a Forward stream and puts them together to weights and batches."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from npu_wire.errors import InvalidInput, NonFiniteInput, QuotaExceeded
from npu_wire.framing import Received
from npu_wire.layer_map import Array, Float32Array, LayerMap, RawSpec
from npu_wire.tensors import MAX_NAME_LENGTH, TensorAssembler, TensorHeader, input_header, is_finite
from npu_wire.v1 import npu_pb2, tensor_pb2


@dataclass(frozen=True)
class UpdateBegun:
    """A weight update is announced, and these initializers come next."""

    weights_version: int
    names: frozenset[str]


@dataclass(frozen=True)
class Weights:
    """Some FP32 initializers of the update that was announced last, complete and finite."""

    tensors: Mapping[str, Float32Array]


@dataclass(frozen=True)
class Batch:
    """Complete inputs by name, how many samples they have, and the layers to answer with."""

    batch_id: int
    weights_version: int
    inputs: Mapping[str, Array]
    samples: int
    wanted: frozenset[int]

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs."""
        return sum(array.nbytes for array in self.inputs.values())


class Intake:
    """State of one stream's requests.

    Args:
        layer_map: of the session's program.
        parameters: name and shape of its initializers.
        max_batch: most samples of a batch.
        max_bytes: most bytes of a weight update, and of a batch.
        weights_version: version that the session holds when the stream begins.

    Attributes:
        size: tensor bytes of the last request.
    """

    def __init__(
        self,
        layer_map: LayerMap,
        parameters: Mapping[str, tuple[int, ...]],
        max_batch: int,
        max_bytes: int,
        weights_version: int,
    ) -> None:
        self.size = 0
        self._layer_map = layer_map
        self._parameters = parameters
        self._max_batch = max_batch
        self._max_bytes = max_bytes
        self._version = weights_version
        self._due: set[str] = set()  # of the update that was announced last
        self._weight: TensorAssembler | None = None
        self._is_early = False
        self._batch_id = 0
        self._wanted: frozenset[int] = frozenset()
        self._inputs: dict[str, Array] = {}
        self._input_bytes = 0
        self._samples = 0
        self._input: TensorAssembler | None = None
        self._data: memoryview | None = None

    @property
    def incomplete(self) -> bool:
        """Whether the client is in the middle of a weight update or a batch."""
        return bool(self._due) or self._input is not None or bool(self._inputs)

    def take(self, received: Received[npu_pb2.ForwardRequest]) -> UpdateBegun | Weights | Batch | None:
        """Takes the next request.

        Returns:
            What it begins or completes, if anything.

        Raises:
            InvalidInput, NonFiniteInput, QuotaExceeded: the request breaks a rule of the wire.
        """
        request, self._data = received.message, received.data
        kind = request.WhichOneof("kind")
        self.size = 0
        if kind != "batch" and (self._input is not None or self._inputs):
            raise InvalidInput(f"got '{kind}' in the middle of batch {self._batch_id}")
        if kind == "update":
            return self._take_update(request.update)
        if kind == "weight":
            return self._take_weights(request.weight)
        if kind == "batch":
            return self._take_batch(request.batch)
        raise InvalidInput(f"got '{kind}' on an attached stream; legal are update, weight and batch")

    def _take_update(self, message: npu_pb2.WeightUpdate) -> UpdateBegun:
        version = message.weights_version
        if self._due:
            raise InvalidInput(
                f"weights version {version} begins while version {self._version} lacks "
                f"{len(self._due)} initializers, '{min(self._due)}' among them"
            )
        if version <= self._version:
            raise InvalidInput(f"weights version {version} is not larger than {self._version}")
        for name in message.names:
            if name not in self._parameters:
                raise InvalidInput(
                    f"weight '{name[:MAX_NAME_LENGTH]}': no layer of this program derives from such an "
                    "initializer"
                )
        names = frozenset(message.names)
        if not names or len(names) != len(message.names):
            raise InvalidInput(f"weights version {version} names no initializer, or one twice")
        self._check_size(f"weights version {version}", sum(map(self._bytes_of, names)))
        self._version, self._due, self._is_early = version, set(names), False
        return UpdateBegun(version, names)

    def _take_weights(self, message: npu_pb2.WeightChunk) -> Weights | None:
        version, tensors = message.weights_version, {}
        if version != self._version:
            raise InvalidInput(
                f"weights of version {version} came; those of version {self._version} are awaited"
            )
        beside, self._data = self._data, None
        for chunk in message.small:
            if self._weight is not None:
                raise InvalidInput(f"got another in the middle of weight '{self._weight.header.name}'")
            name, array = self._take_weight(chunk)
            if array is None:
                raise InvalidInput(f"weight '{name}' is among the small ones, but not whole")
            tensors[name] = array
        self._data = beside
        if message.HasField("chunk"):
            name, array = self._take_weight(message.chunk)
            if array is not None:
                tensors[name] = array
        elif not tensors:
            raise InvalidInput(f"a message of weights version {version} holds none")
        return Weights(tensors) if tensors else None

    def _take_weight(self, chunk: tensor_pb2.TensorChunk) -> tuple[str, Float32Array | None]:
        if self._weight is None:
            name = chunk.name
            if name not in self._due:
                raise InvalidInput(
                    f"weight '{name[:MAX_NAME_LENGTH]}' is not awaited; {len(self._due)} others of version "
                    f"{self._version} are"
                )
            expected = TensorHeader(name, np.dtype(np.float32), self._parameters[name])
            self._weight = TensorAssembler(chunk, expected.nbytes, expected)
        name = self._weight.header.name
        array = self._add(self._weight, chunk)
        if array is None:
            return name, None
        self._weight = None
        if not is_finite(array):
            raise NonFiniteInput(
                f"weight '{name}' of version {self._version} holds NaN or infinity; training diverged?"
            )
        self._due.remove(name)
        return name, array

    def _bytes_of(self, name: str) -> int:
        return 4 * math.prod(self._parameters[name])

    def _take_batch(self, message: npu_pb2.BatchChunk) -> Batch | None:
        if message.weights_version != self._version:
            raise InvalidInput(
                f"batch {message.batch_id} names weights version {message.weights_version}; "
                f"the session's current one is {self._version}"
            )
        if self._input is None and not self._inputs:
            if message.batch_id <= self._batch_id:
                raise InvalidInput(f"batch id {message.batch_id} is not larger than {self._batch_id}")
            if self._due and self._is_early:
                raise InvalidInput(
                    f"batch {message.batch_id} is the second one before the last tensor of weights version "
                    f"{self._version}; one may be so early"
                )
            self._is_early = bool(self._due)
            self._batch_id = message.batch_id
            self._wanted = self._layer_map.output_layers | self._checked_taps(message)
            self._samples = self._input_bytes = 0
        elif message.batch_id != self._batch_id:
            raise InvalidInput(f"a chunk of batch {message.batch_id} in the middle of batch {self._batch_id}")
        if self._input is None:
            self._input = self._input_assembler(message)
        array = self._add(self._input, message.chunk)
        if array is None:
            return None
        self._inputs[self._input.header.name] = array
        self._input = None
        if len(self._inputs) < len(self._layer_map.inputs):
            return None
        inputs, self._inputs = self._inputs, {}
        return Batch(message.batch_id, message.weights_version, inputs, self._samples, self._wanted)

    def _checked_taps(self, message: npu_pb2.BatchChunk) -> frozenset[int]:
        count = len(self._layer_map.layers)
        wrong = sorted(tap for tap in message.taps if tap >= count)
        if wrong:
            raise InvalidInput(
                f"batch {message.batch_id} taps layer {wrong[0]}; the program has layers 0 to {count - 1}"
            )
        return frozenset(message.taps)

    def _input_assembler(self, message: npu_pb2.BatchChunk) -> TensorAssembler:
        """For the next input; the first one with a batch dimension tells how many samples there are."""
        spec = self._layer_map.inputs[len(self._inputs)]
        if not self._samples and not (isinstance(spec, RawSpec) and not spec.batched):
            samples = message.chunk.shape[0] if message.chunk.shape else 0
            if not 1 <= samples <= self._max_batch:
                raise InvalidInput(
                    f"batch {message.batch_id} has {samples} samples; "
                    f"this device takes 1 to {self._max_batch}"
                )
            self._samples = samples
        expected = input_header(spec, self._samples)
        self._input_bytes += expected.nbytes
        # It lies here until the weights that it waits for have room beside it.
        beside = max(map(self._bytes_of, self._due), default=0)
        self._check_size(f"batch {message.batch_id}", self._input_bytes + beside)
        return TensorAssembler(message.chunk, expected.nbytes, expected)

    def _add(self, assembler: TensorAssembler, chunk: tensor_pb2.TensorChunk) -> Array | None:
        before = assembler.received
        data, self._data = self._data, None
        array = assembler.add(chunk, data)
        self.size += assembler.received - before
        return array

    def _check_size(self, what: str, size: int) -> None:
        if size > self._max_bytes:
            raise QuotaExceeded(
                f"{what} has {size} bytes; this server holds {self._max_bytes} for a session. "
                "Start it with a larger --max-session-bytes"
            )
