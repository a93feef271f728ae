"""The standard health service, whole: Check, List and Watch."""

import threading
from collections.abc import Iterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Response = health_pb2.HealthCheckResponse
_messages: Any = health_pb2  # its types package does not know List yet


class HealthService(health_pb2_grpc.HealthServicer):
    """Tells whether the server serves; all its services are well or not together.

    Args:
        services: names that may be asked for, "" among them for the server as a whole.
    """

    def __init__(self, *services: str) -> None:
        self._services = services
        self._changed = threading.Condition()
        self._serving = False
        self._closed = False

    def set_serving(self, serving: bool) -> None:
        """Tells everybody who watches."""
        with self._changed:
            self._serving = serving
            self._changed.notify_all()

    def close(self) -> None:
        """Ends every Watch."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """The status of one service."""
        if request.service not in self._services:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            return _Response()
        return self._response()

    def List(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """The status of every service."""
        return _messages.HealthListResponse(statuses=dict.fromkeys(self._services, self._response()))

    def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> Iterator[health_pb2.HealthCheckResponse]:
        """The status of one service now and whenever it changes."""
        known, told = request.service in self._services, _Response()
        context.add_callback(self._wake)
        while context.is_active():
            with self._changed:
                status = self._response() if known else _Response(status=_Response.SERVICE_UNKNOWN)
                if status == told:
                    if self._closed or not context.is_active():
                        return
                    self._changed.wait()
                    continue
            told = status
            yield status

    def _response(self) -> health_pb2.HealthCheckResponse:
        return _Response(status=_Response.SERVING if self._serving else _Response.NOT_SERVING)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
