"""A client written from the comments in proto/ alone: of `npu_wire` it knows what protoc generates."""

import queue
from collections.abc import Iterable, Iterator, Mapping

import grpc
import numpy as np
import numpy.typing as npt

from npu_wire.v1 import npu_pb2 as npu
from npu_wire.v1 import program_pb2, tensor_pb2

_SERVICE = "/npu_wire.v1.NpuService/"
_MAX_MESSAGE_BYTES = 8 * 2**20
_CHUNK_BYTES = 1000  # several chunks even of small tensors


def quantize(x: npt.NDArray[np.float32], spec: program_pb2.TensorSpec) -> npt.NDArray[np.int8]:
    """TensorSpec: q = clip(round_half_even(x / scale) + zero_point, -128, 127), in float32."""
    q = np.round(x / np.float32(spec.scale)) + np.float32(spec.zero_point)
    return np.clip(q, -128, 127).astype(np.int8)


def dequantize(q: npt.NDArray[np.int8], spec: program_pb2.TensorSpec) -> npt.NDArray[np.float32]:
    """TensorSpec: real = (q - zero_point) * scale."""
    return (q.astype(np.float32) - np.float32(spec.zero_point)) * np.float32(spec.scale)


class ProtoClient:
    """One channel.

    Args:
        target: address of the server.
        token: bearer token.

    Attributes:
        target: address of the server.
    """

    def __init__(self, target: str, token: str = "") -> None:
        options = [
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ]
        self.target = target
        self._channel = grpc.insecure_channel(target, options=options)
        self._metadata = [("authorization", f"Bearer {token}")] if token else []

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()

    def describe(self) -> npu.DescribeResponse:
        """Describe."""
        return self._unary("Describe", npu.DescribeRequest(), npu.DescribeResponse)

    def release(self, session_id: str) -> npu.ReleaseResponse:
        """Release."""
        return self._unary("Release", npu.ReleaseRequest(session_id=session_id), npu.ReleaseResponse)

    def compile(self, model: bytes, ranges: Mapping[str, tuple[float, float]]) -> npu.CompileResponse:
        """Compile: the header, then the model in chunks."""
        named = [program_pb2.ActivationRange(name=n, min=low, max=high) for n, (low, high) in ranges.items()]
        header = npu.CompileHeader(model_bytes=len(model), ranges=named)
        chunks = (model[at : at + _CHUNK_BYTES] for at in range(0, len(model), _CHUNK_BYTES))
        requests = [
            npu.CompileRequest(header=header),
            *(npu.CompileRequest(model_chunk=chunk) for chunk in chunks),
        ]
        call = self._channel.stream_unary(
            _SERVICE + "Compile", npu.CompileRequest.SerializeToString, npu.CompileResponse.FromString
        )
        answer: npu.CompileResponse = call(iter(requests), metadata=self._metadata)
        return answer

    def forward(self, session_id: str) -> "ProtoStream":
        """Forward, with its first message sent."""
        return ProtoStream(self._channel, self._metadata, session_id)

    def _unary(self, name: str, request: object, response_type: type) -> object:
        call = self._channel.unary_unary(
            _SERVICE + name, type(request).SerializeToString, response_type.FromString
        )
        return call(request, metadata=self._metadata)


class ProtoStream:
    """One Forward stream."""

    def __init__(self, channel: grpc.Channel, metadata: list[tuple[str, str]], session_id: str) -> None:
        self._requests: queue.SimpleQueue[npu.ForwardRequest | None] = queue.SimpleQueue()
        call = channel.stream_stream(
            _SERVICE + "Forward", npu.ForwardRequest.SerializeToString, npu.ForwardResponse.FromString
        )
        self.send(npu.ForwardRequest(attach=npu.Attach(session_id=session_id)))
        self.answers: Iterator[npu.ForwardResponse] = call(iter(self._requests.get, None), metadata=metadata)

    def send(self, *requests: npu.ForwardRequest) -> None:
        """Sends messages."""
        for request in requests:
            self._requests.put(request)

    def half_close(self) -> None:
        """Says that nothing more will come."""
        self._requests.put(None)

    def tensors(self) -> tuple[dict[int, npt.NDArray[np.int8]], npu.ForwardResponse]:
        """The tensors of the next batch by layer, and the end of it; weights may load meanwhile."""
        tensors: dict[int, npt.NDArray[np.int8]] = {}
        data = b""
        for answer in self.answers:
            if answer.WhichOneof("kind") == "done":
                return tensors, answer
            if answer.WhichOneof("kind") == "weights_loaded":
                continue
            chunk = answer.tensor.chunk
            assert len(data) == chunk.offset
            data += chunk.data
            if len(data) == int(np.prod(chunk.shape)):
                tensors[answer.tensor.layer], data = _read(chunk, data), b""
        raise AssertionError("the stream ended in the middle of a batch")


def weights(version: int, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Iterator[npu.ForwardRequest]:
    """A weight update with its announcement."""
    yield npu.ForwardRequest(update=npu.WeightUpdate(weights_version=version, names=tensors))
    for name, array in tensors.items():
        for offset, data in _slices(array.tobytes()):
            chunk = tensor_pb2.TensorChunk(
                name=name,
                dtype=tensor_pb2.DATA_TYPE_FLOAT32,
                shape=array.shape,
                layout=tensor_pb2.MEMORY_LAYOUT_CONTIGUOUS,
                offset=offset,
                data=data,
            )
            yield npu.ForwardRequest(weight=npu.WeightChunk(weights_version=version, chunk=chunk))


def batch(
    batch_id: int,
    version: int,
    codes: npt.NDArray[np.int8],
    spec: program_pb2.TensorSpec,
    taps: Iterable[int] = (),
) -> Iterator[npu.ForwardRequest]:
    """A batch in the layout that the server wants."""
    last = spec.layout == tensor_pb2.MEMORY_LAYOUT_CHANNELS_LAST
    raw = (np.moveaxis(codes, 1, -1) if last else codes).tobytes()
    for offset, data in _slices(raw):
        chunk = tensor_pb2.TensorChunk(
            name=spec.name,
            dtype=tensor_pb2.DATA_TYPE_INT8,
            shape=codes.shape,
            layout=spec.layout,
            offset=offset,
            data=data,
        )
        message = npu.BatchChunk(batch_id=batch_id, weights_version=version, chunk=chunk)
        if offset == 0:
            message.taps.extend(taps)
        yield npu.ForwardRequest(batch=message)


def _slices(raw: bytes) -> Iterator[tuple[int, bytes]]:
    for at in range(0, len(raw), _CHUNK_BYTES):
        yield at, raw[at : at + _CHUNK_BYTES]


def _read(chunk: tensor_pb2.TensorChunk, data: bytes) -> npt.NDArray[np.int8]:
    shape = tuple(chunk.shape)
    if chunk.layout == tensor_pb2.MEMORY_LAYOUT_CHANNELS_LAST:
        wire = np.frombuffer(data, np.int8).reshape(shape[0], *shape[2:], shape[1])
        return np.moveaxis(wire, -1, 1)
    return np.frombuffer(data, np.int8).reshape(shape)
