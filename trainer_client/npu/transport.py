"""Calls of the NPU service over one channel, with numpy-side types and this product's errors."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from npu_wire.channel import Endpoint, Security, error_of, open_channel, status_parts, token_metadata
from npu_wire.device import Capabilities, capabilities_from_proto
from npu_wire.errors import NpuError, ServerUnavailable
from npu_wire.framing import Slice, parse_response, serialize
from npu_wire.tensors import split_bytes
from npu_wire.v1 import npu_pb2, npu_pb2_grpc, program_pb2
from trainer_client.npu.session import Ranges

_CLOCK_SAMPLES = 8
_RELEASE_TIMEOUT_S = 2.0
# A crowded server ends the calls that have said nothing yet, the oldest first: nothing has happened then.
_ATTEMPTS = 4


@dataclass(frozen=True)
class Patience:
    """How long to wait.

    Attributes:
        timeout_s: for a server that is connected and silent.
        reconnect_timeout_s: for a server that is gone to come back.
        compile_timeout_s: for a model to be compiled.
    """

    timeout_s: float = 30.0
    reconnect_timeout_s: float = 60.0
    compile_timeout_s: float = 300.0


@dataclass(frozen=True)
class Description:
    """What a server says of itself.

    Attributes:
        info: the device.
        max_in_flight: unanswered batches that it allows a session.
        max_session_bytes: what it holds for a session.
        clock_offset_ns: server's monotonic clock minus ours.
    """

    info: Capabilities
    max_in_flight: int
    max_session_bytes: int
    clock_offset_ns: int


class Transport:
    """One channel to one endpoint.

    Args:
        endpoint: where the server listens.
        security: TLS and token.
        shared_memory: take tensors through memory that a server on this host shares.

    Attributes:
        address: the endpoint.
        local: whether to ask for shared memory: the server may be on this host.

    Raises:
        InvalidInput: see `npu_wire.channel.open_channel`.
    """

    def __init__(self, endpoint: Endpoint, security: Security, shared_memory: bool = True) -> None:
        self.address = endpoint.target
        self.local = shared_memory and endpoint.is_loopback
        self._channel = open_channel(endpoint, security)
        self._stub = npu_pb2_grpc.NpuServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._forward = self._channel.stream_stream(
            f"/{npu_pb2.DESCRIPTOR.services_by_name['NpuService'].full_name}/Forward",
            request_serializer=serialize,
            response_deserializer=parse_response,
        )
        self._metadata = token_metadata(security.token)

    def describe(self, timeout_s: float, wait_for_ready: bool) -> Description:
        """Asks for the device, the quotas and the clock.

        The clock's offset is that of the quickest of several round trips, taken at its middle (as NTP does).

        Raises:
            NpuError: nobody answers, or the call is refused.
        """
        best_ns, offset_ns = 0, 0
        for sample in range(_CLOCK_SAMPLES):
            begin = time.monotonic_ns()
            answer = self._made(
                lambda: self._stub.Describe(
                    npu_pb2.DescribeRequest(),
                    timeout=timeout_s,
                    metadata=self._metadata,
                    wait_for_ready=wait_for_ready,
                )
            )
            round_trip_ns = time.monotonic_ns() - begin
            if sample == 0 or round_trip_ns < best_ns:
                best_ns, offset_ns = round_trip_ns, answer.server_time_ns - begin - round_trip_ns // 2
        return Description(
            capabilities_from_proto(answer.fingerprint, answer.capabilities),
            answer.limits.max_in_flight,
            answer.limits.max_session_bytes,
            offset_ns,
        )

    def compile(self, model: bytes, ranges: Ranges, timeout_s: float) -> npu_pb2.CompileResponse:
        """Opens a session.

        Raises:
            NpuError: nobody answers, or the model is refused.
        """

        def requests() -> Iterator[npu_pb2.CompileRequest]:
            activations = [
                program_pb2.ActivationRange(name=n, min=low, max=high) for n, (low, high) in ranges.items()
            ]
            yield npu_pb2.CompileRequest(
                header=npu_pb2.CompileHeader(model_bytes=len(model), ranges=activations)
            )
            for data in split_bytes(model):
                yield npu_pb2.CompileRequest(model_chunk=data)

        answer: npu_pb2.CompileResponse = self._made(
            lambda: self._stub.Compile(requests(), timeout=timeout_s, metadata=self._metadata)
        )
        return answer

    def forward(self, requests: Iterator[npu_pb2.ForwardRequest | Slice]) -> Any:
        """Opens a Forward stream: a call object that iterates over responses and can be cancelled."""
        return self._made(lambda: self._forward(requests, metadata=self._metadata))

    def release(self, session_id: str) -> None:
        """Ends a session as far as the server can be reached."""
        request = npu_pb2.ReleaseRequest(session_id=session_id)
        with contextlib.suppress(NpuError):  # its lease ends it
            self._made(
                lambda: self._stub.Release(request, timeout=_RELEASE_TIMEOUT_S, metadata=self._metadata)
            )

    def _made(self, call: Callable[[], Any]) -> Any:
        """Makes a call, and makes it again when it had to give way to others before the server knew it."""
        for attempts_left in reversed(range(_ATTEMPTS)):
            try:
                return call()
            except grpc.RpcError as error:
                code, class_name, _ = status_parts(error)
                if not attempts_left or code != "CANCELLED" or class_name is not None:
                    raise self.translate(error) from None
            except ValueError:  # gRPC's answer when another thread has closed the channel meanwhile
                break
        raise ServerUnavailable(f"the connection to {self.address} is closed; connect again")

    def translate(self, error: grpc.RpcError) -> NpuError:
        """The error that a failed call stands for."""
        return error_of(error, self.address)

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()
