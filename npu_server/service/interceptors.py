"""What every call passes through: admission, the token, parsing, errors to statuses, metrics."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from npu_server.service.admission import Lobby, OpenCalls, Ticket
from npu_server.service.requests import Requests
from npu_server.service.stalls import StallWatch, Wait
from npu_server.service.words import for_status
from npu_server.telemetry import Telemetry
from npu_wire.channel import TOKEN_METADATA_KEY, token_matches
from npu_wire.errors import ERROR_KEY, DeviceFault, NpuError, Unauthenticated, status_of

log = logging.getLogger(__name__)

# Probes of an orchestrator carry no token and learn nothing but the health.
_OPEN_SERVICE = "/grpc.health.v1.Health/"
_OWN_SERVICE = "/npu_wire.v1.NpuService/"

# Threads that calls take which have said nothing yet, or only listen (Watch, reflection).
SILENT_CALLS, LISTENERS = 32, 16

Handler = Any  # grpc.RpcMethodHandler, whose fields gRPC leaves untyped


class CallInterceptor(grpc.ServerInterceptor):
    """Admits calls, checks the token, parses messages, maps errors and counts calls.

    To gRPC every method takes a stream of bytes: so a call that says nothing can be ended, and bytes that
    are no message are our own business.

    Args:
        telemetry: counters.
        stalls: ends calls whose client stalls.
        stall_s: patience with a client that is awaited.
        token: bearer token that calls must carry; None: everyone may call.
        on_fault: called when a call ends with DeviceFault.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        stalls: StallWatch,
        stall_s: float,
        token: str | None = None,
        on_fault: Callable[[], None] = lambda: None,
    ) -> None:
        self._telemetry = telemetry
        self._stalls = stalls
        self._stall_s = stall_s
        self._token = token
        self._on_fault = on_fault
        self._silent = Lobby(SILENT_CALLS)
        self._listeners = Lobby(LISTENERS)
        self._open = OpenCalls()

    def intercept_service(self, continuation: Callable[[Any], Handler], details: Any) -> Handler:
        """Wraps the handler that gRPC has found for a call."""
        handler = continuation(details)
        if handler is None:
            return None
        method: str = details.method
        needs_token = self._token is not None and not method.startswith(_OPEN_SERVICE)
        header = next((str(v) for k, v in details.invocation_metadata if k == TOKEN_METADATA_KEY), "")
        allowed = not needs_token or token_matches(header, self._token or "")
        call = _Call(
            method=method,
            takes_stream=handler.request_streaming,
            behavior=_behavior(handler),
            parse=handler.request_deserializer,
            allowed=allowed,
            ticket=self._silent.enter() if allowed else Ticket(),
        )
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                lambda raw, context: self._stream(call, raw, context), None, handler.response_serializer
            )
        return grpc.stream_unary_rpc_method_handler(
            lambda raw, context: self._answer(call, raw, context), None, handler.response_serializer
        )

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Waits until no call is open but those that need no end: silent ones, health and reflection."""
        return self._open.wait_until_none(timeout_s)

    def _answer(self, call: "_Call", raw: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        with _Outcome(self._telemetry, call.method, context, self._on_fault), ExitStack() as stack:
            return call.begin(self._admit(call, raw, context, stack), context)

    def _stream(self, call: "_Call", raw: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
        with _Outcome(self._telemetry, call.method, context, self._on_fault), ExitStack() as stack:
            requests = self._admit(call, raw, context, stack)
            reading = self._wait(context, call.method, "reads nothing", stack)
            begun = call.begin(requests, context)
            if not call.method.startswith(_OWN_SERVICE):
                ticket = self._listeners.enter()
                stack.callback(self._listeners.leave, ticket)
                ticket.bind(context.cancel)
            for answer in stack.enter_context(closing(begun)):
                reading.start()
                yield answer
                reading.renew()

    def _admit(
        self, call: "_Call", raw: Iterator[bytes], context: grpc.ServicerContext, stack: ExitStack
    ) -> Requests[Any]:
        """The call's messages, if it may speak."""
        stack.callback(self._silent.leave, call.ticket)
        if not call.allowed:
            raise Unauthenticated("this server wants a token: connect with token=... or --token-file")
        call.ticket.bind(context.cancel)

        def arrived() -> None:
            self._silent.leave(call.ticket)
            if call.method.startswith(_OWN_SERVICE):
                self._open.enter(context.add_callback)

        saying = self._wait(context, call.method, "says nothing", stack)
        return Requests(raw, call.parse, saying, arrived)

    def _wait(self, context: grpc.ServicerContext, method: str, what: str, stack: ExitStack) -> Wait:
        def end() -> None:
            log.info("%s: the client %s; the call is ended after %g s", method, what, self._stall_s)
            context.cancel()

        wait = Wait(self._stall_s, end, self._stalls.now)
        self._stalls.watch(wait)
        stack.callback(self._stalls.forget, wait)
        return wait


@dataclass(frozen=True)
class _Call:
    """What is known of a call before it has said anything."""

    method: str
    takes_stream: bool
    behavior: Callable[[Any, grpc.ServicerContext], Any]
    parse: Callable[[bytes], Any]
    allowed: bool
    ticket: Ticket

    def begin(self, requests: Requests[Any], context: grpc.ServicerContext) -> Any:
        """Hands the call to the service."""
        return self.behavior(requests if self.takes_stream else requests.only(), context)


class _Outcome:
    """How a call ends."""

    def __init__(
        self,
        telemetry: Telemetry,
        method: str,
        context: grpc.ServicerContext,
        on_fault: Callable[[], None],
    ) -> None:
        self._telemetry = telemetry
        self._method = method
        self._context = context
        self._on_fault = on_fault
        self._begin = time.monotonic()

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object
    ) -> None:
        if isinstance(error, DeviceFault):
            self._on_fault()
        if isinstance(error, GeneratorExit) or not self._context.is_active():
            if error is not None:
                # gRPC keeps its own errors in the call that their frames hold: a cycle around what they hold.
                error.__traceback__ = None
            self._count("CANCELLED")
            if isinstance(error, NpuError):
                # Nobody hears it; raised as it is, gRPC would log it as a fault of ours.
                self._context.abort(grpc.StatusCode.CANCELLED, "")
        elif error is None:
            self._count("OK")
        elif isinstance(error, NpuError):
            self._abort(error)
        elif isinstance(error, Exception):
            log.error("%s failed", self._method, exc_info=error)
            self._on_fault()
            self._abort(DeviceFault("the server failed on this call; its log says why"))

    def _abort(self, error: NpuError) -> NoReturn:
        status = status_of(error)
        log.info("%s: %s: %s", self._method, type(error).__name__, error)
        self._telemetry.error(type(error).__name__)
        self._count(status)
        self._context.set_trailing_metadata(((ERROR_KEY, type(error).__name__),))
        self._context.abort(grpc.StatusCode[status], for_status(str(error)))
        raise AssertionError("abort raises")

    def _count(self, code: str) -> None:
        self._telemetry.request(self._method.rpartition("/")[2], code, time.monotonic() - self._begin)


def _behavior(handler: Handler) -> Callable[[Any, grpc.ServicerContext], Any]:
    """The one of four fields that is set."""
    behaviors = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    found: Callable[[Any, grpc.ServicerContext], Any] = next(b for b in behaviors if b is not None)
    return found
