"""What every call passes through: the token, the one place where errors become statuses, metrics."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc

from npu_server.telemetry import Telemetry
from npu_wire.channel import TOKEN_METADATA_KEY, token_matches
from npu_wire.errors import ERROR_KEY, DeviceFault, NpuError, Unauthenticated, status_of

log = logging.getLogger(__name__)

# gRPC drops metadata beyond 8 KB, so a long message would lose the whole status.
_MAX_MESSAGE = 2_000
# Probes of an orchestrator carry no token and learn nothing but the health.
_OPEN_SERVICE = "/grpc.health.v1.Health/"
_ENDLESS_SERVICES = (_OPEN_SERVICE, "/grpc.reflection.")

Handler = Any  # grpc.RpcMethodHandler, whose fields gRPC leaves untyped


class CallInterceptor(grpc.ServerInterceptor):
    """Checks the token, maps errors and counts calls.

    Args:
        telemetry: counters.
        token: bearer token that calls must carry; None: everyone may call.
        on_fault: called when a call ends with DeviceFault.
    """

    def __init__(
        self, telemetry: Telemetry, token: str | None = None, on_fault: Callable[[], None] = lambda: None
    ) -> None:
        self._telemetry = telemetry
        self._token = token
        self._on_fault = on_fault
        self._open = _OpenCalls()

    def intercept_service(self, continuation: Callable[[Any], Handler], details: Any) -> Handler:
        """Wraps the handler that gRPC has found for a call."""
        handler = continuation(details)
        if handler is None:
            return None
        method: str = details.method
        needs_token = self._token is not None and not method.startswith(_OPEN_SERVICE)
        header = next((str(v) for k, v in details.invocation_metadata if k == TOKEN_METADATA_KEY), "")
        allowed = not needs_token or token_matches(header, self._token or "")
        if handler.response_streaming:
            kind = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream
            wrapped: Callable[..., Any] = self._streaming(method, behavior, allowed)
        else:
            kind = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            behavior = handler.stream_unary if handler.request_streaming else handler.unary_unary
            wrapped = self._single(method, behavior, allowed)
        return kind(wrapped, handler.request_deserializer, handler.response_serializer)

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Waits until no call is open but those that need no end: health and reflection."""
        return self._open.wait_until_none(timeout_s)

    def _single(self, method: str, behavior: Callable[..., Any], allowed: bool) -> Callable[..., Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            self._open.enter(method, context)
            with _Call(self._telemetry, method, context, allowed, self._on_fault):
                return behavior(request, context)

        return call

    def _streaming(
        self, method: str, behavior: Callable[..., Iterator[Any]], allowed: bool
    ) -> Callable[..., Iterator[Any]]:
        def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            self._open.enter(method, context)
            with _Call(self._telemetry, method, context, allowed, self._on_fault):
                yield from behavior(request, context)

        return call


class _OpenCalls:
    """Counts the calls that a shutdown waits for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    def enter(self, method: str, context: grpc.ServicerContext) -> None:
        if method.startswith(_ENDLESS_SERVICES):
            return
        with self._changed:
            self._count += 1
        # When the handler returns, its answer has yet to be sent; gRPC calls back when all is over.
        if not context.add_callback(self._leave):
            self._leave()

    def wait_until_none(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._count == 0, timeout_s)

    def _leave(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()


class _Call:
    """One call, from its token to its status."""

    def __init__(
        self,
        telemetry: Telemetry,
        method: str,
        context: grpc.ServicerContext,
        allowed: bool,
        on_fault: Callable[[], None],
    ) -> None:
        self._telemetry = telemetry
        self._method = method
        self._context = context
        self._allowed = allowed
        self._on_fault = on_fault
        self._begin = time.monotonic()

    def __enter__(self) -> None:
        if not self._allowed:
            self._abort(Unauthenticated("this server wants a token: connect with token=... or --token-file"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object
    ) -> None:
        if error is None or isinstance(error, GeneratorExit):
            self._count("OK" if error is None else "CANCELLED")
        elif isinstance(error, NpuError):
            self._abort(error)
        elif not self._context.is_active():
            self._count("CANCELLED")
        elif isinstance(error, Exception):
            log.error("%s failed", self._method, exc_info=error)
            self._abort(DeviceFault("the server failed on this call; its log says why"))

    def _abort(self, error: NpuError) -> NoReturn:
        status = status_of(error)
        log.info("%s: %s: %s", self._method, type(error).__name__, error)
        self._telemetry.error(type(error).__name__)
        if isinstance(error, DeviceFault):
            self._on_fault()
        self._count(status)
        message = str(error)
        if len(message) > _MAX_MESSAGE:
            message = message[: _MAX_MESSAGE - 1] + "…"
        self._context.set_trailing_metadata(((ERROR_KEY, type(error).__name__),))
        self._context.abort(grpc.StatusCode[status], message)
        raise AssertionError("abort raises")

    def _count(self, code: str) -> None:
        self._telemetry.request(self._method.rpartition("/")[2], code, time.monotonic() - self._begin)
