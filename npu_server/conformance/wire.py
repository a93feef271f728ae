"""A server as the suite's target: a client of the wire that shares nothing with the trainer's.

It is synchronous and opens a stream for each request. So it says nothing about speed, but what it receives
owes nothing to the code that the trainer relies on.
"""

from collections.abc import Collection, Iterator, Mapping

import grpc
import numpy as np

from npu_server.seam import Ranges
from npu_wire.channel import Security, open_channel, parse_endpoint, status_parts, token_metadata
from npu_wire.device import Capabilities, capabilities_from_proto
from npu_wire.errors import DeviceFault, InvalidInput, NpuError, from_status
from npu_wire.layer_map import (
    Array,
    Float32Array,
    Int8Array,
    LayerMap,
    MemoryLayout,
    TensorSpec,
    input_spec_from_proto,
    layer_spec_from_proto,
)
from npu_wire.tensors import OutgoingTensor, TensorAssembler, split_bytes
from npu_wire.v1 import npu_pb2, npu_pb2_grpc, program_pb2


class RemoteTarget:
    """A server.

    Args:
        endpoint: HOST:PORT or unix:PATH.
        timeout_s: for each call.
        security: TLS and token; None: neither.

    Raises:
        NpuError: nobody answers, or the call is refused.
    """

    route = "over gRPC"

    def __init__(
        self,
        endpoint: str,
        timeout_s: float,
        security: Security | None = None,
    ) -> None:
        self._channel = open_channel(parse_endpoint(endpoint), security or Security())
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        self.metadata = token_metadata(security.token if security else None)
        self.stub = npu_pb2_grpc.NpuServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._capabilities = self._describe()

    @property
    def capabilities(self) -> Capabilities:
        """What the server said of its device."""
        return self._capabilities

    def compile(self, model: bytes, ranges: Ranges) -> "RemoteModel":
        """Opens a session.

        Raises:
            NpuError: what the server has against the model.
        """
        try:
            answer = self.stub.Compile(
                _compile_requests(model, ranges), timeout=self.timeout_s, metadata=self.metadata
            )
        except grpc.RpcError as error:
            raise self.translate(error) from None
        return RemoteModel(self, answer)

    def translate(self, error: grpc.RpcError) -> NpuError:
        """The error that a failed call stands for."""
        code, class_name, details = status_parts(error)
        return from_status(code, class_name, details)

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()

    def _describe(self) -> Capabilities:
        try:
            answer = self.stub.Describe(
                npu_pb2.DescribeRequest(),
                timeout=self.timeout_s,
                metadata=self.metadata,
                wait_for_ready=False,
            )
        except grpc.RpcError as error:
            code, class_name, details = status_parts(error)
            raise from_status(code, class_name, f"{self.endpoint}: {details}") from None
        return capabilities_from_proto(answer.fingerprint, answer.capabilities)


class RemoteModel:
    """A session on a server.

    Args:
        target: where it is.
        opened: the server's answer to Compile.
    """

    def __init__(self, target: RemoteTarget, opened: npu_pb2.CompileResponse) -> None:
        self._target = target
        self._session_id = opened.session_id
        self._version = 0
        self.layer_map = LayerMap(
            tuple(input_spec_from_proto(spec) for spec in opened.inputs),
            tuple(layer_spec_from_proto(spec) for spec in opened.layers),
            tuple(opened.outputs),
        )

    def load_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        """Sends an update and waits until it is loaded.

        Raises:
            NpuError: it is refused; the version stays.
        """
        if not tensors:
            return
        requests = list(_weight_requests(self._version + 1, tensors))
        if not any(answer.HasField("weights_loaded") for answer in self._stream(requests)):
            raise DeviceFault("the server ended the stream without a word about the weights")
        self._version += 1

    def run(self, inputs: Mapping[str, Array], taps: Collection[int]) -> dict[int, Int8Array]:
        """Sends a batch and waits for all answers.

        Raises:
            NpuError: it is refused, or the stream ends too soon.
        """
        if any(tap < 0 for tap in taps):
            raise InvalidInput(f"taps {sorted(taps)}: the wire has no negative layers")
        outputs: dict[int, Int8Array] = {}
        assembler: TensorAssembler | None = None
        done = False
        for answer in self._stream(list(self._batch_requests(inputs, taps))):
            done = done or answer.HasField("done")
            if not answer.HasField("tensor"):
                continue
            chunk = answer.tensor.chunk
            assembler = assembler or TensorAssembler(chunk, 2**31)
            tensor: Array | None = assembler.add(chunk)
            if tensor is not None:
                outputs[answer.tensor.layer] = tensor
                assembler = None
        if not done:
            raise DeviceFault("the server ended the stream before the batch was done")
        return outputs

    def close(self) -> None:
        """Releases the session."""
        try:
            self._target.stub.Release(
                npu_pb2.ReleaseRequest(session_id=self._session_id),
                timeout=self._target.timeout_s,
                metadata=self._target.metadata,
            )
        except grpc.RpcError as error:
            raise self._target.translate(error) from None

    def _stream(self, requests: list[npu_pb2.ForwardRequest]) -> Iterator[npu_pb2.ForwardResponse]:
        attach = npu_pb2.ForwardRequest(attach=npu_pb2.Attach(session_id=self._session_id))
        try:
            yield from self._target.stub.Forward(
                iter([attach, *requests]), timeout=self._target.timeout_s, metadata=self._target.metadata
            )
        except grpc.RpcError as error:
            raise self._target.translate(error) from None

    def _batch_requests(
        self, inputs: Mapping[str, Array], taps: Collection[int]
    ) -> Iterator[npu_pb2.ForwardRequest]:
        wanted = sorted(taps)
        for spec in self.layer_map.inputs:
            layout = spec.layout if isinstance(spec, TensorSpec) else MemoryLayout.CONTIGUOUS
            outgoing = OutgoingTensor(spec.name, inputs[spec.name], layout)
            for offset in outgoing.offsets():
                request = npu_pb2.ForwardRequest()
                request.batch.batch_id, request.batch.weights_version = 1, self._version
                request.batch.taps.extend(wanted)
                wanted = []
                outgoing.write(request.batch.chunk, offset)
                yield request


def _compile_requests(model: bytes, ranges: Ranges) -> Iterator[npu_pb2.CompileRequest]:
    activations = [
        program_pb2.ActivationRange(name=n, min=low, max=high) for n, (low, high) in ranges.items()
    ]
    yield npu_pb2.CompileRequest(header=npu_pb2.CompileHeader(model_bytes=len(model), ranges=activations))
    for data in split_bytes(model):
        yield npu_pb2.CompileRequest(model_chunk=data)


def _weight_requests(version: int, tensors: Mapping[str, Float32Array]) -> Iterator[npu_pb2.ForwardRequest]:
    yield npu_pb2.ForwardRequest(update=npu_pb2.WeightUpdate(weights_version=version, names=tensors))
    for name, array in tensors.items():
        outgoing = OutgoingTensor(name, np.asarray(array))
        for offset in outgoing.offsets():
            request = npu_pb2.ForwardRequest()
            request.weight.weights_version = version
            outgoing.write(request.weight.chunk, offset)
            yield request
