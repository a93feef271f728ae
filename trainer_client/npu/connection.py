"""`connect`: an NPU behind an endpoint, or an embedded emulator."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from npu_wire.channel import Security, parse_endpoint
from npu_wire.device import Capabilities
from npu_wire.errors import InvalidInput, ServerUnavailable, Timeout
from trainer_client.npu.embedded import EmbeddedServer
from trainer_client.npu.lifetime import Belongings, HeldSession
from trainer_client.npu.session import Ranges
from trainer_client.npu.stream import RemoteSession
from trainer_client.npu.transport import Description, Patience, Transport

log = logging.getLogger(__name__)


class Connection:
    """An NPU at the other end of a channel: a `trainer_client.npu.session.Npu` and a context manager.

    It closes itself when nobody refers to it or one of its sessions any more, and when the interpreter exits.
    gRPC and fork do not mix: start DataLoader workers that use it with `multiprocessing_context="spawn"`, and
    connect in there.

    Args:
        transport: the channel.
        patience: how long to wait.
        embedded: the child process at the other end, if it is ours.

    Raises:
        ServerUnavailable: nobody answers.
        NpuError: the server refuses.
    """

    def __init__(
        self, transport: Transport, patience: Patience, embedded: EmbeddedServer | None = None
    ) -> None:
        self._transport = transport
        self._patience = patience
        self._embedded = embedded
        self._info = self._first_description().info
        self._belongings = Belongings(transport, embedded)
        self._belongings.when_unreferenced(self, self._belongings.close)

    @property
    def info(self) -> Capabilities:
        """What the NPU is.

        Raises:
            ServerUnavailable: in a process that was forked from the one that connected.
        """
        self._belongings.require_own_process()
        return self._info

    def __repr__(self) -> str:
        """The NPU, where it is and, when a session is open, how its tensors come."""
        mark = self._info.fingerprint
        ways = sorted(set(self._belongings.ways)) or [self._transport.address]
        return f"<NPU {mark.backend}, profile {mark.profile}, at {'; '.join(ways)}>"

    @property
    def embedded(self) -> EmbeddedServer | None:
        """The child process that serves, if this connection started one."""
        return self._embedded

    @property
    def threads_here(self) -> int:
        """Threads that an embedded server computes with, beside this process; 0 without one."""
        return 0 if self._embedded is None else self._embedded.threads

    def compile(self, model: bytes, ranges: Ranges) -> HeldSession:
        """Opens a session for a float ONNX model; see `Npu.compile`.

        The session is released when it is closed, and when nobody refers to it or a batch of it any more.

        Raises:
            UnsupportedModel, InvalidModel, NotCalibrated, InvalidInput, QuotaExceeded: see `npu_wire.errors`.
            ServerUnavailable: nobody answers, the connection is closed, or this process is a fork.
        """
        belongings = self._belongings
        belongings.require_own_process()
        if belongings.closed:
            raise ServerUnavailable("the connection is closed; connect again")
        belongings.settle()
        stream = RemoteSession(
            self._transport, belongings.revive, self._info.profile_hash, model, ranges, self._patience
        )
        belongings.add(stream)
        return HeldSession(stream, belongings, self)

    def close(self) -> None:
        """Closes every session and the connection, and stops an embedded server; idempotent."""
        self._belongings.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _first_description(self) -> Description:
        timeout_s = self._patience.timeout_s
        try:
            return self._transport.describe(timeout_s, wait_for_ready=False)
        except (Timeout, ServerUnavailable) as error:
            reason = error
        try:
            if isinstance(reason, ServerUnavailable):
                log.warning("%s; waiting up to %g s for the server", reason, timeout_s)
                return self._transport.describe(timeout_s, wait_for_ready=True)
        except (Timeout, ServerUnavailable):
            pass  # the first reason tells more than that the time is over
        raise ServerUnavailable(
            f"no NPU server answers at {self._transport.address} within {timeout_s:g} s ({reason}); "
            "start one with `npu-server serve --listen ADDRESS`, or check address and TLS settings"
        )


def connect(
    endpoint: str | None = None,
    *,
    profile: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    tls: bool = False,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
    token: str | None = None,
    shared_memory: bool = True,
    timeout_s: float = 30.0,
    reconnect_timeout_s: float = 60.0,
    compile_timeout_s: float = 300.0,
) -> Connection:
    """Connects to an NPU server, or starts an embedded one.

    Args:
        endpoint: HOST:PORT or unix:PATH; None starts a server of one's own, which stops with the connection.
        profile: numerics profile of the embedded server; None: the server's default.
        backend: backend of the embedded server; None: the server's default.
        device: device of the embedded server; None: the server's default.
        tls: encrypt, trusting the system's authorities.
        tls_ca: PEM file of the authority that signed the server's certificate; implies TLS.
        tls_cert: PEM file of the client's own certificate.
        tls_key: PEM file of its private key.
        token: bearer token; sent to other machines over TLS only.
        shared_memory: take tensors through shared memory where the server turns out to run on this host and
            as this user; `HeldSession.way` tells. Else, and when the memory is full, they come in messages.
        timeout_s: how long a connected server may be silent.
        reconnect_timeout_s: how long to look for a server that is gone.
        compile_timeout_s: how long compiling a model may take.

    Raises:
        InvalidInput: an address, file or token that is wrong, or an argument that would be ignored.
        ServerUnavailable: nobody answers, or the embedded server does not start.
        Unauthenticated: no or the wrong token, or a server that is not to be trusted.
    """
    patience = Patience(timeout_s, reconnect_timeout_s, compile_timeout_s)
    if endpoint is not None:
        _refuse(
            {"profile": profile, "backend": backend, "device": device},
            f"choose an embedded server, and the one at {endpoint} has its own",
        )
        security = Security(tls, _path(tls_ca), _path(tls_cert), _path(tls_key), token)
        return _connected(Transport(parse_endpoint(endpoint), security, shared_memory), patience, None)
    _refuse(
        {"tls": tls, "tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key, "token": token},
        "protect the way to an endpoint, and an embedded server has none",
    )
    embedded = EmbeddedServer(backend, profile, device)
    return _connected(Transport(embedded.endpoint, Security(), shared_memory), patience, embedded)


def _refuse(arguments: Mapping[str, object], why: str) -> None:
    """Refuses arguments that were given although nobody would look at them."""
    given = [name for name, value in arguments.items() if value not in (None, False)]
    if given:
        raise InvalidInput(f"{', '.join(given)}: such settings {why}; leave them out")


def _connected(transport: Transport, patience: Patience, embedded: EmbeddedServer | None) -> Connection:
    try:
        return Connection(transport, patience, embedded)
    except BaseException:
        transport.close()
        if embedded is not None:
            embedded.close()
        raise


def _path(text: str | Path | None) -> Path | None:
    return None if text is None else Path(text)
