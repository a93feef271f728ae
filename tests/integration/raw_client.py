"""A client that speaks the protocol by hand, to break its rules."""

import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import grpc
import numpy as np
import pytest

from npu_wire.channel import status_parts
from npu_wire.layer_map import Float32Array
from npu_wire.tensors import OutgoingTensor
from npu_wire.v1 import npu_pb2, npu_pb2_grpc, tensor_pb2


class Raw:
    """Speaks the protocol by hand, to break its rules."""

    opened: ClassVar[list["Raw"]] = []

    def __init__(self, address: str) -> None:
        self.opened.append(self)
        self.ended = threading.Event()
        # The least that HTTP/2 lets a sender send unread, whatever the line could carry.
        window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 2**16))
        self.channel = grpc.insecure_channel(address, options=window)
        self.stub = npu_pb2_grpc.NpuServiceStub(self.channel)

    def close(self) -> None:
        """Ends every call."""
        self.ended.set()
        self.channel.close()

    def compile(
        self, model: bytes = b"model", ranges: Mapping[str, tuple[float, float]] = MappingProxyType({})
    ) -> str:
        """Opens a session."""
        header = npu_pb2.CompileHeader(model_bytes=len(model))
        for name, (low, high) in ranges.items():
            header.ranges.add(name=name, min=low, max=high)
        messages = [npu_pb2.CompileRequest(header=header), npu_pb2.CompileRequest(model_chunk=model)]
        return str(self.stub.Compile(iter(messages)).session_id)

    def silence(self) -> Iterator[npu_pb2.ForwardRequest]:
        """Keeps a stream's requests open until the end of the test."""
        self.ended.wait()
        yield from ()

    def error(self, call: Iterator[object]) -> tuple[str, str | None, str]:
        """Status, class and text that a call ends with."""
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        return status_parts(caught.value)


def memory_of(process: "subprocess.Popen[str]") -> int:
    """Resident bytes."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


def threads_of(process: "subprocess.Popen[str]") -> int:
    """Its threads."""
    return len(list(Path(f"/proc/{process.pid}/task").iterdir()))


def attach(session_id: str) -> npu_pb2.ForwardRequest:
    """First message of a stream."""
    return npu_pb2.ForwardRequest(attach=npu_pb2.Attach(session_id=session_id))


def input_chunk(batch_id: int = 1, version: int = 0, **changes: object) -> npu_pb2.ForwardRequest:
    """A whole batch of one sample of zeros, some fields of its chunk changed."""
    request = npu_pb2.ForwardRequest()
    request.batch.batch_id = batch_id
    request.batch.weights_version = version
    OutgoingTensor("t0", np.zeros((1, 2, 4, 4), np.int8)).write(request.batch.chunk, 0)
    for name, value in changes.items():
        if name == "taps":
            request.batch.taps.extend(value)  # type: ignore[arg-type]
        elif name == "shape":
            del request.batch.chunk.shape[:]
            request.batch.chunk.shape.extend(value)  # type: ignore[arg-type]
        else:
            setattr(request.batch.chunk, name, value)
    return request


def weight_chunk(version: int, value: float = 1.0) -> npu_pb2.ForwardRequest:
    """The whole initializer "bias"."""
    return weight(version, "bias", np.array(value, np.float32))


def announced(
    name: str, shape: tuple[int, ...], dtype: tensor_pb2.DataType = tensor_pb2.DATA_TYPE_FLOAT32
) -> npu_pb2.ForwardRequest:
    """The first byte of an initializer, and the promise of the rest."""
    request = npu_pb2.ForwardRequest()
    request.weight.weights_version = 1
    chunk = request.weight.chunk
    chunk.name, chunk.dtype, chunk.layout = name, dtype, tensor_pb2.MEMORY_LAYOUT_CONTIGUOUS
    chunk.shape.extend(shape)
    chunk.data = b"x"
    return request


def weight(version: int, name: str, array: Float32Array) -> npu_pb2.ForwardRequest:
    """A whole initializer."""
    request = npu_pb2.ForwardRequest()
    request.weight.weights_version = version
    OutgoingTensor(name, array).write(request.weight.chunk, 0)
    return request


def begin(version: int, *names: str) -> npu_pb2.ForwardRequest:
    """Announces a weight update, of "bias" unless other names are given."""
    return npu_pb2.ForwardRequest(
        update=npu_pb2.WeightUpdate(weights_version=version, names=names or ("bias",))
    )
