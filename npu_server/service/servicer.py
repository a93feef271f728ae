"""The gRPC service: decode, session, encode."""

import math
import time
from collections.abc import Iterable, Iterator

import grpc

from npu_server.service.answers import Message
from npu_server.service.device import Device
from npu_server.service.forward import ForwardStream, attach_of
from npu_server.service.quotas import Ledger, Limits
from npu_server.service.rendezvous import Rendezvous, StreamMemory
from npu_server.service.requests import Requests
from npu_server.service.sessions import SessionTable
from npu_server.service.stalls import StallWatch
from npu_server.telemetry import Telemetry
from npu_wire.device import capabilities_to_proto, fingerprint_to_proto
from npu_wire.errors import InvalidInput, InvalidModel, QuotaExceeded
from npu_wire.framing import Received, parse_request, serialize
from npu_wire.layer_map import input_spec_to_proto, layer_spec_to_proto
from npu_wire.v1 import device_pb2, npu_pb2, npu_pb2_grpc, program_pb2


class NpuService(npu_pb2_grpc.NpuServiceServicer):
    """Serves one device.

    Args:
        device: the NPU.
        sessions: its sessions.
        limits: quotas.
        telemetry: counters.
        stalls: ends calls whose client does not read.
        rendezvous: where clients on this host get shared memory.
    """

    def __init__(
        self,
        device: Device,
        sessions: SessionTable,
        limits: Limits,
        telemetry: Telemetry,
        stalls: StallWatch,
        rendezvous: Rendezvous,
    ) -> None:
        self._device = device
        self._sessions = sessions
        self._limits = limits
        self._telemetry = telemetry
        self._stalls = stalls
        self._rendezvous = rendezvous

    def Describe(  # noqa: N802
        self, request: npu_pb2.DescribeRequest, context: grpc.ServicerContext
    ) -> npu_pb2.DescribeResponse:
        """Tells what the device is, what it can do and what the quotas are."""
        limits = self._limits
        return npu_pb2.DescribeResponse(
            fingerprint=fingerprint_to_proto(self._device.capabilities.fingerprint),
            capabilities=capabilities_to_proto(self._device.capabilities),
            limits=device_pb2.Limits(
                max_sessions=limits.max_sessions,
                max_model_bytes=limits.max_model_bytes,
                max_in_flight=limits.max_in_flight,
                lease_s=limits.lease_s,
                max_session_bytes=limits.max_session_bytes,
                max_server_bytes=limits.max_server_bytes,
                stall_s=limits.stall_s,
            ),
            server_time_ns=time.monotonic_ns(),
        )

    def Compile(  # noqa: N802
        self, requests: Requests[npu_pb2.CompileRequest], context: grpc.ServicerContext
    ) -> npu_pb2.CompileResponse:
        """Compiles a model and opens a session."""
        first = next(requests, None)
        if first is None or first.WhichOneof("kind") != "header":
            raise InvalidInput("the first message of Compile must be the header")
        requests.awaited = True
        ranges = _checked_ranges(first.header.ranges)
        with self._sessions.reserve() as place:
            if not context.add_callback(place.given_up.set):
                place.given_up.set()
            model = _receive_model(
                requests, first.header.model_bytes, self._limits.max_model_bytes, place.ledger
            )
            session = self._sessions.open(model, ranges, place)
        if not context.is_active():
            self._sessions.release(session.session_id)
        return npu_pb2.CompileResponse(
            session_id=session.session_id,
            profile_hash=self._device.capabilities.profile_hash,
            lease_s=self._limits.lease_s,
            inputs=[input_spec_to_proto(spec) for spec in session.layer_map.inputs],
            layers=[layer_spec_to_proto(layer) for layer in session.layer_map.layers],
            outputs=session.layer_map.outputs,
        )

    def Forward(  # noqa: N802
        self, requests: Requests[Received[npu_pb2.ForwardRequest]], context: grpc.ServicerContext
    ) -> Iterator[Message]:
        """Runs batches of one session."""
        attach = attach_of(next(requests, None))
        session = self._sessions.get(attach.session_id)
        stream = ForwardStream(
            session,
            self._device,
            self._limits,
            self._telemetry,
            self._stalls,
            context.cancel,
            StreamMemory(self._rendezvous, attach.shared_memory),
        )
        self._sessions.attach(session, stream)
        try:
            if context.add_callback(lambda: self._sessions.detach(session, stream)):
                yield from stream.run(requests)
        finally:
            self._sessions.detach(session, stream)

    def KeepAlive(  # noqa: N802
        self, request: npu_pb2.KeepAliveRequest, context: grpc.ServicerContext
    ) -> npu_pb2.KeepAliveResponse:
        """Renews the lease of an idle session."""
        self._sessions.get(request.session_id)
        return npu_pb2.KeepAliveResponse(lease_s=self._limits.lease_s)

    def Release(  # noqa: N802
        self, request: npu_pb2.ReleaseRequest, context: grpc.ServicerContext
    ) -> npu_pb2.ReleaseResponse:
        """Ends a session and frees what it holds."""
        self._sessions.release(request.session_id)
        return npu_pb2.ReleaseResponse()


def add_to(server: grpc.Server, service: NpuService) -> None:
    """Registers the service; protobuf does not touch the tensors of its Forward streams."""
    npu_pb2_grpc.add_NpuServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    name: str = npu_pb2.DESCRIPTOR.services_by_name["NpuService"].full_name
    forward = grpc.stream_stream_rpc_method_handler(service.Forward, parse_request, serialize)
    server.add_registered_method_handlers(name, {"Forward": forward})


def _checked_ranges(messages: Iterable[program_pb2.ActivationRange]) -> dict[str, tuple[float, float]]:
    ranges: dict[str, tuple[float, float]] = {}
    for message in messages:
        if not message.name or message.name in ranges:
            raise InvalidInput(f"activation range '{message.name}' has no name or comes twice")
        if not (math.isfinite(message.min) and math.isfinite(message.max)):
            raise InvalidInput(
                f"range of '{message.name}' is [{message.min}, {message.max}]; it must be finite"
            )
        if message.min >= message.max:
            raise InvalidInput(
                f"range of '{message.name}' is [{message.min}, {message.max}]; its width must be > 0. "
                "Calibrate with data that moves this activation"
            )
        ranges[message.name] = (message.min, message.max)
    return ranges


def _receive_model(
    requests: Iterator[npu_pb2.CompileRequest], size: int, max_bytes: int, ledger: Ledger
) -> bytes:
    if size == 0:
        raise InvalidModel("the model has 0 bytes")
    if size > max_bytes:
        raise QuotaExceeded(
            f"the model has {size} bytes; this server accepts {max_bytes}. "
            "Start it with a larger --max-model-bytes"
        )
    chunks: list[bytes] = []
    received = 0
    for request in requests:
        if request.WhichOneof("kind") != "model_chunk":
            raise InvalidInput("after the header only model chunks may come")
        data = request.model_chunk
        received += len(data)
        if not data or received > size:
            raise InvalidInput(f"the header announces {size} bytes of model; an empty chunk or more came")
        ledger.take(len(data))
        chunks.append(data)
    if received != size:
        raise InvalidInput(f"the header announces {size} bytes of model, but {received} came")
    return b"".join(chunks)
