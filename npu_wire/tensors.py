"""Arrays to `TensorChunk` messages and back.

A tensor travels as raw little-endian bytes in chunks of up to `CHUNK_BYTES`. A channels-last tensor of shape
(N, C, ...) travels in the order (N, ..., C): a transposed view of such an array is sent as it lies in memory.
A chunk's bytes travel beside its message (`npu_wire.framing`); `write` makes a message that has both.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npu_wire.errors import InvalidInput
from npu_wire.layer_map import (
    NUMPY_TYPES,
    WIRE_TYPES,
    Array,
    Float32Array,
    InputSpec,
    MemoryLayout,
    TensorSpec,
)
from npu_wire.v1 import tensor_pb2

CHUNK_BYTES = 2 * 2**20
MAX_NAME_LENGTH = 1024
MAX_RANK = 8

_LEGAL_TYPES = ", ".join(tensor_pb2.DataType.Name(code).removeprefix("DATA_TYPE_") for code in NUMPY_TYPES)

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError(
        "npu_wire sends the bytes of arrays as they lie in memory and so needs a little-endian machine"
    )


@dataclass(frozen=True)
class TensorHeader:
    """What every chunk of one tensor repeats.

    Attributes:
        name: ONNX value or initializer name.
        dtype: a key of `npu_wire.layer_map.WIRE_TYPES`.
        shape: logical shape, all sizes >= 1.
        layout: order of the elements in the bytes.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    layout: MemoryLayout = MemoryLayout.CONTIGUOUS

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def wire_shape(self) -> tuple[int, ...]:
        """Shape in the order of the bytes."""
        if self.layout is MemoryLayout.CHANNELS_LAST:
            return (self.shape[0], *self.shape[2:], self.shape[1])
        return self.shape

    def view(self, raw: bytes | memoryview | Array) -> Array:
        """The tensor that `raw` holds, logical shape, read-only and without a copy if it is aligned.

        Raises:
            InvalidInput: a boolean that is neither 0 nor 1.
        """
        if self.dtype == np.bool_ and np.frombuffer(raw, np.uint8).max() > 1:
            raise InvalidInput(f"tensor '{self.name}': a boolean is one byte, 0 or 1")
        array = np.frombuffer(raw, self.dtype)
        if not array.flags.aligned:
            array = array.copy()  # cut out of a message: few kernels take a float that begins anywhere
        array = array.reshape(self.wire_shape)
        array.flags.writeable = False
        return np.moveaxis(array, -1, 1) if self.layout is MemoryLayout.CHANNELS_LAST else array


def header_of(chunk: tensor_pb2.TensorChunk) -> TensorHeader:
    """Reads and checks what a chunk says about its tensor.

    Raises:
        InvalidInput: a name, type, layout or shape that no tensor can have.
    """
    name = chunk.name
    if not 0 < len(name) <= MAX_NAME_LENGTH:
        raise InvalidInput(f"a tensor's name has {len(name)} characters; legal are 1 to {MAX_NAME_LENGTH}")
    dtype = NUMPY_TYPES.get(chunk.dtype)
    if dtype is None:
        raise InvalidInput(f"tensor '{name}': unknown data type {chunk.dtype}; legal are {_LEGAL_TYPES}")
    shape = tuple(chunk.shape)
    if len(shape) > MAX_RANK or not all(shape):
        raise InvalidInput(f"tensor '{name}': illegal shape {shape}; legal are up to {MAX_RANK} sizes >= 1")
    try:
        layout = MemoryLayout(chunk.layout)
    except ValueError:
        raise InvalidInput(f"tensor '{name}': unknown memory layout {chunk.layout}") from None
    if layout is MemoryLayout.CHANNELS_LAST and len(shape) < 3:
        raise InvalidInput(
            f"tensor '{name}': channels-last needs a batch, a channel and a spatial size, not {shape}"
        )
    return TensorHeader(name, dtype, shape, layout)


def input_header(spec: InputSpec, samples: int) -> TensorHeader:
    """What the chunks of an input say in a batch of so many samples."""
    if isinstance(spec, TensorSpec):
        return TensorHeader(spec.name, np.dtype(np.int8), (samples, *spec.shape), spec.layout)
    return TensorHeader(spec.name, spec.dtype, (samples, *spec.shape) if spec.batched else spec.shape)


def check_inputs(specs: Sequence[InputSpec], inputs: Mapping[str, Array], max_batch: int) -> int:
    """Checks the inputs of a batch and returns how many samples they hold.

    Args:
        specs: what the program wants; at least one with a batch dimension.
        inputs: arrays by name.
        max_batch: most samples.

    Raises:
        InvalidInput: another name, dtype or shape than wanted, no sample or too many.
    """
    if inputs.keys() != {spec.name for spec in specs}:
        raise InvalidInput(f"inputs {sorted(inputs)} came; due are {[spec.name for spec in specs]}")
    shapes = [inputs[x.name].shape for x in specs if isinstance(x, TensorSpec) or x.batched]
    samples = shapes[0][0] if shapes[0] else 0
    for spec in specs:
        array, due = inputs[spec.name], input_header(spec, samples)
        if array.dtype != due.dtype or array.shape != due.shape:
            raise InvalidInput(
                f"input '{spec.name}' is {array.dtype} of shape {array.shape}; "
                f"it must be {due.dtype} of shape {due.shape}"
            )
    if not 1 <= samples <= max_batch:
        raise InvalidInput(f"the batch has {samples} samples; this NPU takes 1 to {max_batch}")
    return samples


def is_finite(array: Float32Array) -> bool:
    """Whether no element is NaN or infinite; usually by their sum, which is neither then."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())


class OutgoingTensor:
    """A tensor on its way out, to be written chunk by chunk into messages.

    Args:
        name: ONNX value or initializer name.
        array: of a dtype in `npu_wire.layer_map.WIRE_TYPES`, any strides.
        layout: order of the elements on the wire; an array that already lies so in memory is not copied.

    Attributes:
        header: what the tensor is.
        raw: all its bytes, in the order of the wire.

    Raises:
        InvalidInput: a data type or shape that cannot travel.
    """

    def __init__(self, name: str, array: Array, layout: MemoryLayout = MemoryLayout.CONTIGUOUS) -> None:
        if array.dtype not in WIRE_TYPES:
            raise InvalidInput(f"tensor '{name}' is {array.dtype}; legal are {_LEGAL_TYPES}")
        if array.size == 0:
            raise InvalidInput(f"tensor '{name}' of shape {array.shape} is empty")
        self.header = TensorHeader(name, array.dtype, array.shape, layout)
        ordered = np.moveaxis(array, 1, -1) if layout is MemoryLayout.CHANNELS_LAST else array
        self.raw = np.ascontiguousarray(ordered).reshape(-1).view(np.uint8).data

    def offsets(self, chunk_bytes: int = CHUNK_BYTES) -> range:
        """Where each chunk begins."""
        return range(0, self.raw.nbytes, chunk_bytes)

    def data(self, offset: int, chunk_bytes: int = CHUNK_BYTES) -> memoryview:
        """The bytes of the chunk that begins at `offset`."""
        return self.raw[offset : offset + chunk_bytes]

    def chunk(self, offset: int) -> tensor_pb2.TensorChunk:
        """The message of the chunk that begins at `offset`, without its data."""
        chunk = tensor_pb2.TensorChunk()
        self._describe(chunk, offset)
        return chunk

    def write(self, chunk: tensor_pb2.TensorChunk, offset: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Fills an empty chunk message with the bytes from `offset` on."""
        self._describe(chunk, offset)
        chunk.data = bytes(self.data(offset, chunk_bytes))

    def _describe(self, chunk: tensor_pb2.TensorChunk, offset: int) -> None:
        header = self.header
        chunk.name = header.name
        chunk.dtype = WIRE_TYPES[header.dtype]
        chunk.shape.extend(header.shape)
        chunk.layout = header.layout.value
        chunk.offset = offset


class TensorAssembler:
    """Puts the chunks of one tensor together.

    The header is compared with what the receiver expects or allows at once. Memory is reserved then, but the
    system commits it page by page as bytes come. A tensor that comes in one chunk is not copied at all.

    Args:
        first: the first chunk.
        max_bytes: largest tensor to accept.
        expected: what the header must be, where the receiver knows; None accepts any within `max_bytes`.

    Attributes:
        header: what the tensor will be.
        received: bytes so far.

    Raises:
        InvalidInput: another header than expected, or a tensor that is too large.
    """

    def __init__(
        self, first: tensor_pb2.TensorChunk, max_bytes: int, expected: TensorHeader | None = None
    ) -> None:
        self.header = header_of(first)
        if expected is not None and self.header != expected:
            raise InvalidInput(f"got a tensor {_describe(self.header)}; expected {_describe(expected)}")
        if self.header.nbytes > max_bytes:
            raise InvalidInput(
                f"tensor {_describe(self.header)} has {self.header.nbytes} bytes; legal are {max_bytes}"
            )
        self.received = 0
        self._raw: Array | None = None

    def add(self, chunk: tensor_pb2.TensorChunk, beside: memoryview | None = None) -> Array | None:
        """Takes the next chunk.

        Args:
            chunk: the message.
            beside: its data; None: it is in the message.

        Returns:
            The whole tensor, logical shape and read-only, when this chunk completes it.

        Raises:
            InvalidInput: a chunk of another tensor, a gap, an overlap, no bytes or too many.
        """
        data = chunk.data if beside is None else beside
        received, total = self.received, self.header.nbytes
        if received and header_of(chunk) != self.header:
            raise InvalidInput(
                f"a chunk of {_describe(header_of(chunk))} came in the middle of {_describe(self.header)}"
            )
        if chunk.offset != received:
            raise InvalidInput(
                f"tensor '{self.header.name}': a chunk at byte {chunk.offset}; {received} must follow"
            )
        if not data or received + len(data) > total:
            raise InvalidInput(
                f"tensor '{self.header.name}': {len(data)} bytes came at byte {received} of {total}"
            )
        if len(data) == total:
            self.received = total
            return self.header.view(data)
        if self._raw is None:
            self._raw = np.empty(total, np.uint8)
        self.received += len(data)
        self._raw[received : self.received] = np.frombuffer(data, np.uint8)
        return self.header.view(self._raw) if self.received == total else None


def split_bytes(raw: bytes, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Slices of a byte string, in order."""
    for offset in range(0, len(raw), chunk_bytes):
        yield raw[offset : offset + chunk_bytes]


def _describe(header: TensorHeader) -> str:
    return f"'{header.name}' ({header.dtype}, shape {header.shape}, {header.layout.name.lower()})"
