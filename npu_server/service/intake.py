"""Checks the requests of a Forward stream and puts them together to weight updates and batches."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from npu_wire.errors import InvalidInput, NonFiniteInput, QuotaExceeded
from npu_wire.framing import Received
from npu_wire.layer_map import Array, Float32Array, LayerMap, RawSpec
from npu_wire.tensors import TensorAssembler, header_of, input_header
from npu_wire.v1 import npu_pb2, tensor_pb2


@dataclass(frozen=True)
class WeightUpdate:
    """Changed FP32 initializers, complete and finite."""

    weights_version: int
    tensors: Mapping[str, Float32Array]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array.nbytes for array in self.tensors.values())


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
        self._update: dict[str, Float32Array] = {}
        self._update_version = 0
        self._update_bytes = 0
        self._batch_id = 0
        self._wanted: frozenset[int] = frozenset()
        self._inputs: dict[str, Array] = {}
        self._input_bytes = 0
        self._samples = 0
        self._assembler: TensorAssembler | None = None
        self._assembling = ""
        self._data: memoryview | None = None

    @property
    def incomplete(self) -> bool:
        """Whether the client is in the middle of a weight update or a batch."""
        return self._assembler is not None or bool(self._inputs) or self._update_version != 0

    def take(self, received: Received[npu_pb2.ForwardRequest]) -> WeightUpdate | Batch | None:
        """Takes the next request.

        Returns:
            What it completes, if anything.

        Raises:
            InvalidInput, NonFiniteInput, QuotaExceeded: the request breaks a rule of the wire.
        """
        request, self._data = received.message, received.data
        kind = request.WhichOneof("kind")
        self.size = 0
        if self._assembler is not None and kind != self._assembling:
            raise InvalidInput(f"got '{kind}' in the middle of a tensor '{self._assembler.header.name}'")
        if self._inputs and kind != "batch":
            raise InvalidInput(f"got '{kind}' between the inputs of batch {self._batch_id}")
        if kind == "weight":
            self._take_weight(request.weight)
            return None
        if kind == "commit":
            return self._take_commit(request.commit.weights_version)
        if kind == "batch":
            return self._take_batch(request.batch)
        raise InvalidInput(f"got '{kind}' on an attached stream; legal are weight, commit and batch")

    def _take_weight(self, message: npu_pb2.WeightChunk) -> None:
        version = message.weights_version
        if version <= self._version or (self._update_version and version != self._update_version):
            raise InvalidInput(
                f"weights version {version} is not larger than {self._version}, or mixes with an open update"
            )
        self._update_version = version
        if self._assembler is None:
            self._assembler = self._weight_assembler(message)
            self._assembling = "weight"
        array = self._add(self._assembler, message.chunk)
        if array is None:
            return
        name = self._assembler.header.name
        self._assembler = None
        if not np.isfinite(array).all():
            raise NonFiniteInput(
                f"weight '{name}' of version {version} holds NaN or infinity; training diverged?"
            )
        self._update[name] = array

    def _weight_assembler(self, message: npu_pb2.WeightChunk) -> TensorAssembler:
        header = header_of(message.chunk)
        if header.name not in self._parameters:
            raise InvalidInput(
                f"weight '{header.name}': no layer of this program derives from such an initializer"
            )
        shape = self._parameters[header.name]
        if header.dtype != np.float32 or header.shape != shape:
            raise InvalidInput(
                f"weight '{header.name}' is {header.dtype} {header.shape}; compiled with float32 {shape}"
            )
        if header.name in self._update:
            raise InvalidInput(f"weight '{header.name}' comes twice in version {message.weights_version}")
        self._update_bytes += header.nbytes
        self._check_size(f"weights version {message.weights_version}", self._update_bytes)
        return TensorAssembler(message.chunk, header.nbytes)

    def _take_commit(self, version: int) -> WeightUpdate:
        if version != self._update_version or not self._update:
            raise InvalidInput(f"commit of weights version {version}, of which no tensor has come")
        update = WeightUpdate(version, self._update)
        self._version = version
        self._update, self._update_version, self._update_bytes = {}, 0, 0
        return update

    def _take_batch(self, message: npu_pb2.BatchChunk) -> Batch | None:
        if message.weights_version != self._version:
            raise InvalidInput(
                f"batch {message.batch_id} names weights version {message.weights_version}; "
                f"the session's current one is {self._version}"
            )
        if self._assembler is None and not self._inputs:
            if message.batch_id <= self._batch_id:
                raise InvalidInput(f"batch id {message.batch_id} is not larger than {self._batch_id}")
            self._batch_id = message.batch_id
            self._wanted = self._layer_map.output_layers | self._checked_taps(message)
            self._samples = self._input_bytes = 0
        elif message.batch_id != self._batch_id:
            raise InvalidInput(f"a chunk of batch {message.batch_id} in the middle of batch {self._batch_id}")
        if self._assembler is None:
            self._assembler = self._input_assembler(message)
            self._assembling = "batch"
        array = self._add(self._assembler, message.chunk)
        if array is None:
            return None
        self._inputs[self._assembler.header.name] = array
        self._assembler = None
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
        self._check_size(f"batch {message.batch_id}", self._input_bytes)
        return TensorAssembler(message.chunk, expected.nbytes, expected)

    def _add(self, assembler: TensorAssembler, chunk: tensor_pb2.TensorChunk) -> Array | None:
        before = assembler.received
        data, self._data = self._data, None
        array = assembler.add(chunk, data)
        self.size = assembler.received - before
        return array

    def _check_size(self, what: str, size: int) -> None:
        if size > self._max_bytes:
            raise QuotaExceeded(
                f"{what} has {size} bytes; this server holds {self._max_bytes} for a session. "
                "Start it with a larger --max-session-bytes"
            )
