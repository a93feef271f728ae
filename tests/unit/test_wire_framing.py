"""Tensor bytes that go around protobuf, with protobuf itself as the judge of every message."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from npu_wire.framing import Received, Slice, parse_request, parse_response, serialize
from npu_wire.tensors import OutgoingTensor
from npu_wire.v1 import npu_pb2

BYTES = np.arange(300_000, dtype=np.uint32).view(np.uint8).view(np.int8).reshape(2, 6, 100_000)
OUTGOING = OutgoingTensor("conv", BYTES)
OFFSET, CHUNK = 65_536, 131_072

Request = npu_pb2.ForwardRequest
Response = npu_pb2.ForwardResponse


def by_protobuf(kind: str) -> Request | Response:
    """A message of each kind, made with protobuf alone."""
    if kind == "tensor":
        answer = Response(profile_hash="ab" * 32, weights_version=300, batch_id=7)
        answer.tensor.layer = 5
        OUTGOING.write(answer.tensor.chunk, OFFSET, CHUNK)
        return answer
    request = Request()
    if kind == "weight":
        request.weight.weights_version = 300
        OUTGOING.write(request.weight.chunk, OFFSET, CHUNK)
    else:
        request.batch.batch_id, request.batch.weights_version = 7, 300
        OUTGOING.write(request.batch.chunk, OFFSET, CHUNK)
    return request


def around_protobuf(kind: str) -> Slice:
    """The same messages, their data beside them."""
    chunk, data = OUTGOING.chunk(OFFSET), OUTGOING.data(OFFSET, CHUNK)
    if kind == "tensor":
        outer = Response(profile_hash="ab" * 32, weights_version=300, batch_id=7)
        return Slice(outer, npu_pb2.LayerTensor(layer=5), chunk, data)
    if kind == "weight":
        return Slice(Request(), npu_pb2.WeightChunk(weights_version=300), chunk, data)
    return Slice(Request(), npu_pb2.BatchChunk(batch_id=7, weights_version=300), chunk, data)


def chunk_of(message: Request | Response) -> "npu_pb2.tensor__pb2.TensorChunk":
    """The chunk in a message."""
    return getattr(message, message.WhichOneof("kind")).chunk


def whole(received: Received) -> Request | Response:
    """The message with its data put back."""
    if received.data is not None:
        chunk_of(received.message).data = bytes(received.data)
    return received.message


def parse(kind: str, raw: bytes) -> Received:
    """Reads a message of that kind."""
    return parse_response(raw) if kind == "tensor" else parse_request(raw)


KINDS = ["weight", "batch", "tensor"]


@pytest.mark.parametrize("kind", KINDS)
def test_protobuf_reads_what_went_around_it(kind: str) -> None:
    """Any client written from proto/ understands these bytes."""
    assert by_protobuf(kind) == type(by_protobuf(kind)).FromString(serialize(around_protobuf(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_data_is_a_view_of_the_bytes_that_came(kind: str) -> None:
    """Neither cutting it out nor making an array of it copies it."""
    raw = serialize(around_protobuf(kind))
    received = parse(kind, raw)
    assert received.data is not None
    assert np.shares_memory(np.frombuffer(raw, np.uint8), np.frombuffer(received.data, np.uint8))
    assert chunk_of(received.message).data == b""
    assert by_protobuf(kind) == whole(received)


@pytest.mark.parametrize("kind", ["weight", "batch"])
def test_data_of_other_clients_is_cut_out_too(kind: str) -> None:
    """Protobuf writes fields in the order of their numbers, which puts a request's data last."""
    received = parse_request(by_protobuf(kind).SerializeToString())
    assert received.data is not None
    assert by_protobuf(kind) == whole(received)


def test_fields_in_another_order_are_left_to_protobuf() -> None:
    """A server of another make sends what follows the chunk in LayerTensor behind it."""
    answer = by_protobuf("tensor")
    answer.tensor.end_ns = 9  # type: ignore[union-attr]
    received = parse_response(answer.SerializeToString())
    assert received == Received(answer, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_in_two_pieces_is_merged(kind: str) -> None:
    """Protobuf merges a field that comes twice, in whichever piece the data is."""
    raw = serialize(around_protobuf(kind))
    other = type(by_protobuf(kind)).FromString(raw)
    chunk_of(other).ClearField("data")
    other = other.SerializeToString()
    for pieces in (raw + other, other + raw, raw + raw):
        assert type(by_protobuf(kind)).FromString(pieces) == whole(parse(kind, pieces))


def test_the_last_of_two_kinds_counts() -> None:
    """A oneof holds what came last."""
    raw, update = serialize(around_protobuf("weight")), Request()
    update.update.weights_version = 4
    for pieces in (raw + update.SerializeToString(), update.SerializeToString() + raw):
        assert Request.FromString(pieces) == whole(parse_request(pieces))


def test_many_tiny_fields_are_left_to_protobuf() -> None:
    """Walking through a million of them in Python would hold the server up."""
    raw = b"\xa0\x06\x01" * 1000 + serialize(around_protobuf("weight"))
    assert parse_request(raw).data is None
    assert Request.FromString(raw) == whole(parse_request(raw))


@given(
    kind=st.sampled_from(KINDS),
    at=st.integers(0, 150),
    cut=st.integers(0, 20),
    put=st.binary(max_size=12),
    tail=st.sampled_from([b"", b"\x00", b"\x08\x01", b"\x12\x02\x08\x01", b"\xff" * 11]),
)
def test_damaged_bytes_mean_what_protobuf_says(kind: str, at: int, cut: int, put: bytes, tail: bytes) -> None:
    """Whatever bytes come, the message is protobuf's, or there is none."""
    raw = serialize(around_protobuf(kind))
    damaged = raw[:at] + put + raw[at + cut :] + tail
    try:
        due = type(by_protobuf(kind)).FromString(damaged)
    except DecodeError:
        with pytest.raises(DecodeError):
            parse(kind, damaged)
        return
    received = parse(kind, damaged)
    assert due == whole(received)


def test_floats_begin_at_their_alignment() -> None:
    """A tensor that fills one message begins anywhere in it; its array does not."""
    weights = np.linspace(-1, 1, 20_000, dtype=np.float32)
    outgoing = OutgoingTensor("w", weights)
    for version in (1, 200, 30_000):
        message = Slice(
            Request(), npu_pb2.WeightChunk(weights_version=version), outgoing.chunk(0), outgoing.data(0)
        )
        received = parse_request(serialize(message))
        assert received.data is not None
        array = outgoing.header.view(received.data)
        assert array.flags.aligned
        np.testing.assert_array_equal(weights, array)
