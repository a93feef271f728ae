"""Serves the HTTP side: in a thread of its own, under its own names, and with little patience."""

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Collection

import uvicorn
from h11 import LocalProtocolError
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from npu_wire.errors import InvalidInput, ServerUnavailable

_MAX_HEAD_BYTES = 16 * 2**10
_MAX_CONNECTIONS = 128
_START_S = 10.0
_GOODBYE_S = 1  # for answers on their way
STOP_S = 2.0  # the longest that closing takes


class HttpServer:
    """Serves an app and leaves signals to the process's owner; once it is there, it listens.

    Args:
        app: what to serve.
        host: address to bind.
        port: TCP port; 0: any.
        names: host names, besides `host` and this machine's own, that requests may call it by.
        request_s: seconds that a connection has for a request and its answer.

    Raises:
        InvalidInput: the address cannot be bound.
        ServerUnavailable: it does not start.
    """

    def __init__(
        self, app: ASGIApp, host: str, port: int, names: Collection[str] = (), request_s: float = 10.0
    ) -> None:
        family, shown = (socket.AF_INET6, f"[{host}]") if ":" in host else (socket.AF_INET, host)
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise InvalidInput(
                f"cannot serve HTTP on {shown}:{port}: {error.strerror}; choose another --http, or off"
            ) from None
        self.address = f"{shown}:{self._socket.getsockname()[1]}"
        self._server = _Server(
            uvicorn.Config(
                KnownHosts(app, {host, socket.gethostname(), *names}),
                http=_impatient(request_s),
                ws="none",
                h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
                timeout_graceful_shutdown=_GOODBYE_S,
                log_level="warning",
                lifespan="off",
            )
        )
        # uvicorn installs signal handlers in the main thread only, which this one is not.
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="npu-http", daemon=True
        )
        self._thread.start()
        if not self._server.listens.wait(_START_S):
            self.close()
            raise ServerUnavailable(f"HTTP on {self.address} does not start; choose another --http, or off")

    def close(self) -> None:
        """Stops serving."""
        self._server.should_exit = True
        self._thread.join(STOP_S)
        self._socket.close()


class KnownHosts:
    """Refuses requests for other hosts, so that no web page reads this server under a name of its own.

    A page's script may only talk to the name that it came from; DNS rebinding lets that name point here. An
    IP address is no such name.

    Args:
        app: whom to ask for all others.
        names: host names to answer to, besides localhost.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        host = dict(scope["headers"]).get(b"host")
        if host is None or self._knows(host.decode("latin-1")):
            await self._app(scope, receive, send)
        else:
            refusal = "this server does not know itself by that host name; start it with --http-hosts NAME\n"
            await PlainTextResponse(refusal, 421)(scope, receive, send)

    def _knows(self, host: str) -> bool:
        name, _, port = host.rpartition(":")
        if not name or not port.isdigit():
            name = host
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return name.lower().removesuffix(".") in self._names
        return True


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()


def _impatient(request_s: float) -> type[H11Protocol]:
    """Connections that end when a request and its answer take longer; of too many the oldest goes.

    uvicorn's own timeout is for connections that are idle between requests: one byte of a header ends it.
    """

    class ImpatientProtocol(H11Protocol):
        deadline: asyncio.TimerHandle

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.deadline = self.loop.call_later(request_s, transport.abort)
            waiting = [c for c in self.connections if isinstance(c, ImpatientProtocol)]
            if len(waiting) > _MAX_CONNECTIONS:
                min(waiting, key=lambda connection: connection.deadline.when()).transport.abort()

        def send_400_response(self, msg: str) -> None:
            if self.cycle is not None:
                self.cycle.disconnected = True  # an answer under way has nowhere to go any more
            try:
                super().send_400_response(msg)
            except LocalProtocolError:  # an answer was given already
                self.transport.close()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.deadline.cancel()
            self.deadline = self.loop.call_later(request_s, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            self.deadline.cancel()
            super().connection_lost(exc)

    return ImpatientProtocol
