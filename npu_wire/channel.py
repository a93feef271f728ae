"""What both ends of a connection must set alike: addresses, channel options, credentials."""

import hmac
import ipaddress
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from npu_wire.errors import (
    ERROR_KEY,
    InvalidInput,
    NpuError,
    ServerUnavailable,
    Timeout,
    Unauthenticated,
    from_status,
)

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

# Statuses that gRPC itself gives when a connection breaks; a server's own errors carry ERROR_KEY.
_CONNECTION_LOST = ("UNAVAILABLE", "UNKNOWN", "INTERNAL", "CANCELLED")
# What gRPC says of a TLS handshake that will not succeed by waiting.
_HANDSHAKE = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is signed by no authority that is trusted here; give the "
    "authority's file: tls_ca=FILE (--tls-ca FILE)",
    "Hostname Verification Check failed": "its certificate is for another name; connect to one that is in it",
    "WRONG_VERSION_NUMBER": "it does not speak TLS; connect without, or start it with a certificate",
}


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


@dataclass(frozen=True)
class Security:
    """How a client proves who is who.

    Attributes:
        tls: encrypt; implied by any of the files.
        ca: PEM file of the authority that signed the server's certificate; None: the system's authorities.
        cert: PEM file of the client's own certificate.
        key: PEM file of its private key.
        token: bearer token.
    """

    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token: str | None = None

    @property
    def encrypted(self) -> bool:
        """Whether the connection uses TLS."""
        return self.tls or self.ca is not None or self.cert is not None or self.key is not None


def open_channel(endpoint: Endpoint, security: Security) -> grpc.Channel:
    """A channel to a server.

    Raises:
        InvalidInput: a file cannot be used, or the token cannot travel or would do so in the clear.
    """
    if security.token is not None:
        _check_token(security.token, "the token")
    if security.encrypted:
        credentials = channel_credentials(security.ca, security.cert, security.key)
        return grpc.secure_channel(endpoint.target, credentials, options=client_options())
    if security.token is not None and not endpoint.is_loopback:
        raise InvalidInput(
            f"a token for {endpoint.target} would travel unencrypted; use TLS: tls_ca=FILE or tls=True "
            "(--tls-ca FILE or --tls)"
        )
    return grpc.insecure_channel(endpoint.target, options=client_options())


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """TLS for a server; with `client_ca` every client must show a certificate of that authority.

    Raises:
        InvalidInput: a file that cannot be read or is not what it should be.
    """
    chain, private = _read_pair(cert, key, "TLS")
    return grpc.ssl_server_credentials(
        [(private, chain)],
        root_certificates=_read_ca(client_ca, "client CA") if client_ca else None,
        require_client_auth=client_ca is not None,
    )


def channel_credentials(ca: Path | None, cert: Path | None, key: Path | None) -> grpc.ChannelCredentials:
    """TLS for a client; without `ca` the system's authorities are trusted.

    Raises:
        InvalidInput: a file that cannot be read or is not what it should be, or one without its counterpart.
    """
    if (cert is None) != (key is None):
        raise InvalidInput(
            "a client certificate needs its key and a key its certificate; give both or neither"
        )
    chain, private = _read_pair(cert, key, "client") if cert and key else (None, None)
    return grpc.ssl_channel_credentials(
        root_certificates=_read_ca(ca, "CA") if ca else None,
        private_key=private,
        certificate_chain=chain,
    )


def read_token(path: Path) -> str:
    """The bearer token that a file holds.

    Raises:
        InvalidInput: a file that cannot be read, is empty or holds more than one printable ASCII word.
    """
    token = read_file(path, "token").decode("utf-8", "replace").strip()
    _check_token(token, f"token file '{path}'")
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


def error_of(error: grpc.RpcError, address: str) -> NpuError:
    """The error that a failed call stands for: the server's own, or what is wrong with the way to it."""
    code, class_name, details = status_parts(error)
    if class_name is not None:
        return from_status(code, class_name, details)
    for sign, meaning in _HANDSHAKE.items():
        if sign in details:
            return Unauthenticated(f"no trust in the server at {address}: {meaning}")
    if code in _CONNECTION_LOST:
        return ServerUnavailable(f"no connection to {address}: {details}")
    if code == "DEADLINE_EXCEEDED":
        return Timeout(f"the server at {address} did not answer in time: {details}")
    return from_status(code, None, details)


def read_file(path: Path, what: str) -> bytes:
    """A file's bytes.

    Raises:
        InvalidInput: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read the {what} file '{path}': {error.strerror}") from None


def _check_token(token: str, what: str) -> None:
    if not token:
        wrong = "it is empty"
    elif "\n" in token or "\r" in token:
        wrong = "it has a line break"
    elif not token.isascii() or not token.isprintable() or " " in token:
        wrong = "it has white space or other characters"
    else:
        return
    raise InvalidInput(f"{what} must be one word of printable ASCII characters; {wrong}")


def _read_ca(path: Path, what: str) -> bytes:
    """A file of certificates; gRPC itself would only ever say that the handshake failed."""
    content = read_file(path, what)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise InvalidInput(
            f"the {what} file '{path}' holds no certificate in PEM form ({error.reason})"
        ) from None
    return content


def _read_pair(cert: Path, key: Path, what: str) -> tuple[bytes, bytes]:
    """A certificate chain and its private key, which fit each other."""
    private, chain = read_file(key, f"{what} key"), read_file(cert, f"{what} certificate")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, password=lambda: b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InvalidInput(
                f"the {what} key '{key}' does not belong to the certificate '{cert}'; give the pair that was "
                "issued together"
            ) from None
        raise InvalidInput(
            f"the {what} certificate '{cert}' and key '{key}' cannot be used ({error.reason}); both must be "
            "PEM files, the key without a password"
        ) from None
    return chain, private
