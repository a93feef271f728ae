"""Messages of a Forward stream whose tensor bytes protobuf never touches.

Protobuf copies a `bytes` field when it is set, when the message is serialized, when it is parsed and at every
access. Here the small rest of a message is protobuf's, and the tensor's bytes are joined to it, or cut out of
it, in protobuf's own encoding: each message on the way down to `TensorChunk.data` is the last field of the
one around it. Any protobuf implementation reads and writes such messages; those that order their fields in
another way are left to protobuf.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from npu_wire.v1 import npu_pb2, tensor_pb2

_LENGTH_DELIMITED = 2
_SIZE_OF_FIXED = {1: 8, 5: 4}
# Below, protobuf's copies cost less than walking through the fields.
_SMALLEST = 2**15
# So that many tiny fields are not walked through in Python.
_MOST_FIELDS = 32

_DATA = tensor_pb2.TensorChunk.DATA_FIELD_NUMBER
_REQUEST, _RESPONSE = npu_pb2.ForwardRequest, npu_pb2.ForwardResponse
_WAYS: dict[type[Message], tuple[int, int]] = {
    npu_pb2.WeightChunk: (_REQUEST.WEIGHT_FIELD_NUMBER, npu_pb2.WeightChunk.CHUNK_FIELD_NUMBER),
    npu_pb2.BatchChunk: (_REQUEST.BATCH_FIELD_NUMBER, npu_pb2.BatchChunk.CHUNK_FIELD_NUMBER),
    npu_pb2.LayerTensor: (_RESPONSE.TENSOR_FIELD_NUMBER, npu_pb2.LayerTensor.CHUNK_FIELD_NUMBER),
}
"""What carries a chunk -> its field in the outermost message, and the chunk's field in it."""

_REQUEST_WAYS = (_WAYS[npu_pb2.WeightChunk], _WAYS[npu_pb2.BatchChunk])
_RESPONSE_WAYS = (_WAYS[npu_pb2.LayerTensor],)

Parsed = TypeVar("Parsed", npu_pb2.ForwardRequest, npu_pb2.ForwardResponse)


@dataclass(frozen=True)
class Slice:
    """A message with a slice of a tensor, on its way out.

    Attributes:
        outer: the outermost message, without the field that holds `carrier`.
        carrier: what holds the chunk, without it.
        chunk: the slice, without its data.
        data: its bytes; read when the message is sent.
    """

    outer: npu_pb2.ForwardRequest | npu_pb2.ForwardResponse
    carrier: npu_pb2.WeightChunk | npu_pb2.BatchChunk | npu_pb2.LayerTensor
    chunk: tensor_pb2.TensorChunk
    data: memoryview


@dataclass(frozen=True)
class Received(Generic[Parsed]):
    """A message that has come.

    Attributes:
        message: all of it but, where that was cut out, its chunk's data.
        data: those bytes, a view of what came; None: they are in the message, if there are any.
    """

    message: Parsed
    data: memoryview | None = None


def serialize(message: Message | Slice) -> bytes:
    """The message's bytes on the wire; a slice's data is copied once."""
    if not isinstance(message, Slice):
        return message.SerializeToString()
    outer_field, chunk_field = _WAYS[type(message.carrier)]
    data = _head(_DATA, message.data.nbytes)
    chunk = message.chunk.SerializeToString()
    chunk_bytes = len(chunk) + len(data) + message.data.nbytes
    carrier = message.carrier.SerializeToString() + _head(chunk_field, chunk_bytes)
    outer = message.outer.SerializeToString() + _head(outer_field, len(carrier) + chunk_bytes)
    return b"".join((outer, carrier, chunk, data, message.data))


def parse_request(raw: bytes) -> Received[npu_pb2.ForwardRequest]:
    """A request from its bytes on the wire.

    Raises:
        google.protobuf.message.DecodeError: they are none.
    """
    return _parse(raw, npu_pb2.ForwardRequest, _REQUEST_WAYS)


def parse_response(raw: bytes) -> Received[npu_pb2.ForwardResponse]:
    """An answer from its bytes on the wire.

    Raises:
        google.protobuf.message.DecodeError: they are none.
    """
    return _parse(raw, npu_pb2.ForwardResponse, _RESPONSE_WAYS)


def _parse(raw: bytes, kind: type[Parsed], ways: tuple[tuple[int, int], ...]) -> Received[Parsed]:
    if len(raw) >= _SMALLEST:
        for way in ways:
            try:
                rest, data = _cut(raw, way)
            except (ValueError, IndexError):
                continue
            return Received(kind.FromString(rest), data)
    return Received(kind.FromString(raw))


def _cut(raw: bytes, way: tuple[int, int]) -> tuple[bytes, memoryview]:
    """The message without its chunk's data, and the data.

    Raises:
        ValueError, IndexError: the fields on the way are not each the last one of the message around it.
    """
    outer_field, chunk_field = way
    outer_end, begin = _last_field(raw, 0, outer_field)
    carrier_end, chunk_begin = _last_field(raw, begin, chunk_field)
    chunk_end, data_begin = _last_field(raw, chunk_begin, _DATA)
    chunk = raw[chunk_begin:chunk_end]
    carrier = raw[begin:carrier_end] + _head(chunk_field, len(chunk)) + chunk
    rest = raw[:outer_end] + _head(outer_field, len(carrier)) + carrier
    return rest, memoryview(raw)[data_begin:]


def _last_field(raw: bytes, at: int, number: int) -> tuple[int, int]:
    """Where a field that comes once, and last, begins and where its content does.

    Raises:
        ValueError, IndexError: it does not, or these bytes are no message.
    """
    for _ in range(_MOST_FIELDS):
        head = at
        tag, at = _varint(raw, at)
        wire_type = tag & 7
        if wire_type == 0:
            _, at = _varint(raw, at)
        elif wire_type in _SIZE_OF_FIXED:
            at += _SIZE_OF_FIXED[wire_type]
        elif wire_type == _LENGTH_DELIMITED:
            size, at = _varint(raw, at)
            if tag >> 3 == number:
                if at + size != len(raw):
                    raise ValueError
                return head, at
            at += size
        else:
            break
    raise ValueError


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError


def _head(number: int, size: int) -> bytes:
    """Tag and length of a length-delimited field with a number below 16."""
    encoded = bytearray((number << 3 | _LENGTH_DELIMITED,))
    while size > 0x7F:
        encoded.append(size & 0x7F | 0x80)
        size >>= 7
    encoded.append(size)
    return bytes(encoded)
