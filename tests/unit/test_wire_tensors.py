"""Arrays to chunks and back, against NumPy's own byte order."""

import numpy as np
import pytest

from npu_wire.errors import InvalidInput
from npu_wire.layer_map import MemoryLayout
from npu_wire.tensors import OutgoingTensor, TensorAssembler, TensorHeader, header_of
from npu_wire.v1 import tensor_pb2

LAST = MemoryLayout.CHANNELS_LAST


def chunks_of(outgoing: OutgoingTensor, chunk_bytes: int) -> list[tensor_pb2.TensorChunk]:
    """All chunk messages of a tensor."""
    chunks = []
    for offset in outgoing.offsets(chunk_bytes):
        chunk = tensor_pb2.TensorChunk()
        outgoing.write(chunk, offset, chunk_bytes)
        chunks.append(chunk)
    return chunks


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
@pytest.mark.parametrize("layout", list(MemoryLayout))
@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 10_000])
def test_chunks_carry_the_bytes_that_numpy_has(dtype: type, layout: MemoryLayout, chunk_bytes: int) -> None:
    """Contiguous = C order of the array, channels last = C order of its (N, H, W, C) transposition."""
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(dtype)
    chunks = chunks_of(OutgoingTensor("x", array, layout), chunk_bytes)
    order = array.transpose(0, 2, 3, 1) if layout is LAST else array
    assert b"".join(chunk.data for chunk in chunks) == order.tobytes()
    assembler = TensorAssembler(chunks[0], array.nbytes)
    whole = [assembler.add(chunk) for chunk in chunks]
    assert whole[:-1] == [None] * (len(chunks) - 1)
    assert whole[-1] is not None
    np.testing.assert_array_equal(array, whole[-1])
    assert not whole[-1].flags.writeable


def test_a_transposed_view_is_not_copied() -> None:
    """The channels-last view of a contiguous (N, H, W, C) array is sent from its own memory."""
    memory = np.zeros((2, 4, 5, 3), np.int8)
    outgoing = OutgoingTensor("x", memory.transpose(0, 3, 1, 2), LAST)
    memory[0, 0, 0, 0] = 77
    assert chunks_of(outgoing, 1000)[0].data[0] == 77


def test_a_scalar_travels() -> None:
    """Rank 0 is one element."""
    (chunk,) = chunks_of(OutgoingTensor("x", np.array(2.5, np.float32)), 1000)
    whole = TensorAssembler(chunk, 4).add(chunk)
    assert whole is not None
    assert (whole.shape, float(whole)) == ((), 2.5)


@pytest.mark.parametrize(
    "array",
    [np.zeros(3, np.complex64), np.zeros(3, np.uint16), np.zeros((0, 3), np.int8), np.zeros(3, ">f4")],
)
def test_what_cannot_travel(array: np.ndarray) -> None:
    """Other types, big-endian numbers and nothing at all."""
    with pytest.raises(InvalidInput, match="'x'"):
        OutgoingTensor("x", array)


def chunk(**changes: object) -> tensor_pb2.TensorChunk:
    """A sound one-chunk tensor with some fields changed."""
    fields = {"name": "x", "dtype": 1, "shape": [2, 3], "layout": 1, "data": b"abcdef"} | changes
    return tensor_pb2.TensorChunk(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": ""}, "0 characters"),
        ({"name": "n" * 1025}, "1025 characters"),
        ({"dtype": 99}, "unknown data type 99"),
        ({"shape": [2, 0]}, r"illegal shape \(2, 0\)"),
        ({"shape": [1] * 9}, "illegal shape"),
        ({"layout": 9}, "unknown memory layout 9"),
        ({"layout": 2}, "channels-last needs"),
    ],
)
def test_headers_that_no_tensor_can_have(changes: dict[str, object], reason: str) -> None:
    """Each field of a chunk, broken by itself."""
    with pytest.raises(InvalidInput, match=reason):
        header_of(chunk(**changes))


def test_nothing_is_allocated_for_a_tensor_that_is_too_large() -> None:
    """A header of 2^60 bytes is refused by arithmetic alone."""
    with pytest.raises(InvalidInput, match=f"has {2**60} bytes"):
        TensorAssembler(chunk(shape=[2**30, 2**30]), max_bytes=2**30)


def test_a_receiver_that_knows_what_comes_takes_nothing_else() -> None:
    """Same size, other shape."""
    expected = TensorHeader("x", np.dtype(np.int8), (3, 2))
    with pytest.raises(InvalidInput, match=r"shape \(2, 3\).*expected.*shape \(3, 2\)"):
        TensorAssembler(chunk(), 6, expected)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (chunk(offset=4, data=b"ef"), "byte 4; 3 must follow"),
        (chunk(offset=2, data=b"cdef"), "byte 2; 3 must follow"),
        (chunk(offset=3, data=b"defg"), "4 bytes came at byte 3 of 6"),
        (chunk(offset=3, data=b""), "0 bytes"),
        (chunk(offset=3, data=b"def", name="y"), "'y'.*in the middle of 'x'"),
        (chunk(offset=3, data=b"def", shape=[3, 2]), "in the middle"),
    ],
)
def test_gaps_overlaps_and_strangers(second: tensor_pb2.TensorChunk, reason: str) -> None:
    """The second chunk of a tensor of six bytes, three of which have come."""
    first = chunk(data=b"abc")
    assembler = TensorAssembler(first, 6)
    assert assembler.add(first) is None
    with pytest.raises(InvalidInput, match=reason):
        assembler.add(second)
