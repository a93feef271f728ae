"""What both ends of a connection must set alike: addresses, channel options, credentials."""

import hmac
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from npu_wire.errors import ERROR_KEY, InvalidInput

MAX_MESSAGE_BYTES = 8 * 2**20
TOKEN_METADATA_KEY = "authorization"

Options = Sequence[tuple[str, int]]

MAX_SOCKET_PATH_BYTES = 107
"""What `sockaddr_un` holds on Linux, without its final zero."""

_KEEPALIVE_MS = 20_000
_KEEPALIVE_TIMEOUT_MS = 10_000
_COMMON: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # The largest that HTTP/2 allows: a 2 MB chunk then is one frame (1.34, not 1.10 GB/s, on a unix socket).
    ("grpc.http2.max_frame_size", 2**24 - 1),
    # Pings find out that the other machine is gone; also between batches, when the stream is silent.
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    # The timeout above alone leaves the ping itself a minute.
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


def server_options() -> Options:
    """Channel options of a server."""
    return (
        *_COMMON,
        ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
        # Without this a second server on the same port would start and silently share its connections.
        ("grpc.so_reuseport", 0),
    )


def client_options() -> Options:
    """Channel options of a client: a restarted server is found again within a second."""
    return (
        *_COMMON,
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 250),
        # Channels with equal options share connections; a connection of its own keeps clients independent.
        ("grpc.use_local_subchannel_pool", 1),
    )


@dataclass(frozen=True)
class Endpoint:
    """An address: HOST:PORT, [IPV6]:PORT or unix:PATH.

    Attributes:
        host: host name or IP address; empty for a unix socket.
        port: TCP port; 0 lets a server choose one.
        path: path of a unix socket; empty for TCP.
    """

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def target(self) -> str:
        """The address as gRPC wants it."""
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True when no other machine can reach it."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_endpoint(text: str) -> Endpoint:
    """Reads an address.

    Raises:
        InvalidInput: neither HOST:PORT nor unix:PATH, or a path that is too long for a socket.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path:
            raise InvalidInput(f"address '{text}' has no path; write unix:/path/to/socket")
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise InvalidInput(
                f"address '{text}': the path of a unix socket has at most {MAX_SOCKET_PATH_BYTES} bytes, "
                f"this one has {len(os.fsencode(path))}; choose a shorter one"
            )
        return Endpoint(path=path)
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidInput(
            f"'{text}' is not an address; write HOST:PORT, [IPV6]:PORT or unix:/path/to/socket"
        )
    return Endpoint(host=host, port=int(port))


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """TLS for a server; with `client_ca` every client must show a certificate of that authority.

    Raises:
        InvalidInput: a file that cannot be read.
    """
    return grpc.ssl_server_credentials(
        [(read_file(key, "TLS key"), read_file(cert, "TLS certificate"))],
        root_certificates=read_file(client_ca, "client CA") if client_ca else None,
        require_client_auth=client_ca is not None,
    )


def channel_credentials(ca: Path | None, cert: Path | None, key: Path | None) -> grpc.ChannelCredentials:
    """TLS for a client; without `ca` the system's authorities are trusted.

    Raises:
        InvalidInput: a file that cannot be read, or a certificate without its key.
    """
    if (cert is None) != (key is None):
        raise InvalidInput(
            "a client certificate needs its key and a key its certificate; give both or neither"
        )
    return grpc.ssl_channel_credentials(
        root_certificates=read_file(ca, "CA") if ca else None,
        private_key=read_file(key, "client key") if key else None,
        certificate_chain=read_file(cert, "client certificate") if cert else None,
    )


def read_token(path: Path) -> str:
    """The bearer token that a file holds.

    Raises:
        InvalidInput: a file that cannot be read, is empty or holds more than one printable ASCII word.
    """
    token = read_file(path, "token").decode("utf-8", "replace").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidInput(f"token file '{path}' must hold one word of printable ASCII characters")
    return token


def token_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Call metadata that carries the token."""
    return ((TOKEN_METADATA_KEY, f"Bearer {token}"),) if token else ()


def token_matches(header: str, token: str) -> bool:
    """Whether a metadata value carries the token, in a time that does not depend on where they differ."""
    return hmac.compare_digest(header.encode(), f"Bearer {token}".encode())


def status_parts(error: grpc.RpcError) -> tuple[str, str | None, str]:
    """Name of the status code, class name that the server sent (None: gRPC's own error), and message."""
    trailing: Any = error.trailing_metadata() or ()
    return error.code().name, dict(trailing).get(ERROR_KEY), error.details() or "no details"


def read_file(path: Path, what: str) -> bytes:
    """A file's bytes.

    Raises:
        InvalidInput: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read the {what} file '{path}': {error.strerror}") from None
