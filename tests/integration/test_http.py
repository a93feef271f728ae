"""The HTTP side among strangers: half a request, other people's host names, and the moment it listens."""

import asyncio
import socket
from collections.abc import Iterator

import pytest
import uvicorn
from fake_backend import Start, wait_until
from prometheus_client import CollectorRegistry

from npu_server.dashboard.http_server import HttpServer
from npu_server.dashboard.pages import create_dashboard
from npu_server.telemetry import DeviceStatus, Status

DEVICE = DeviceStatus("fake", "adder", "plus-one", "0" * 64, "cpu", serving=True)
STATUS = Status(DEVICE, 0, 0, 0, 0, 0, {}, ())
TIMEOUT_S = 60.0


@pytest.fixture
def server() -> Iterator[HttpServer]:
    """A server that calls itself npu.example as well."""
    http = HttpServer(create_dashboard(lambda: STATUS, CollectorRegistry()), "127.0.0.1", 0, ("npu.example",))
    yield http
    http.close()


@pytest.fixture
def impatient() -> Iterator[HttpServer]:
    """A server with hardly any patience."""
    app = create_dashboard(lambda: STATUS, CollectorRegistry())
    http = HttpServer(app, "127.0.0.1", 0, request_s=0.3)
    yield http
    http.close()


def dial(address: str) -> socket.socket:
    """A connection."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), TIMEOUT_S)


def all_of(connection: socket.socket) -> bytes:
    """What comes until the other side ends the connection."""
    received = b""
    try:
        while piece := connection.recv(4096):
            received += piece
    except ConnectionResetError:
        pass
    return received


def ask(address: str, host: str) -> str:
    """Status line of the health page, asked for under a host name."""
    with dial(address) as connection:
        connection.sendall(f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return all_of(connection).decode().partition("\r\n")[0]


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /healthz HTTP/1.1\r\nX-Slow: ",
        b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n",
    ],
    ids=["nothing", "half a request", "a whole one and a half", "a body that does not come"],
)
def test_a_connection_that_does_not_finish_its_request_is_ended(
    impatient: HttpServer, beginning: bytes
) -> None:
    """Whoever begins and goes silent is cut off."""
    with dial(impatient.address) as slow:
        slow.sendall(beginning)
        all_of(slow)


def test_a_trickle_of_bytes_is_no_request(impatient: HttpServer) -> None:
    """A byte now and then does not buy time."""
    with dial(impatient.address) as slow:
        slow.settimeout(0.01)
        slow.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        wait_until(lambda: not accepts(slow))


def accepts(connection: socket.socket) -> bool:
    """Whether the other side still takes a byte."""
    try:
        connection.sendall(b"x")
        return bool(connection.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False


def test_of_many_silent_connections_the_oldest_make_place() -> None:
    """300 silent ones do not keep the next one out."""
    patient = create_dashboard(lambda: STATUS, CollectorRegistry())
    http = HttpServer(patient, "127.0.0.1", 0, request_s=1000.0)
    silent = [dial(http.address) for _ in range(300)]
    try:
        all_of(silent[0])
        assert ask(http.address, "localhost") == "HTTP/1.1 200 OK"
    finally:
        for connection in silent:
            connection.close()
        http.close()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", "HTTP/1.1 200 OK"),
        ("10.1.2.3", "HTTP/1.1 200 OK"),
        ("[::1]:8080", "HTTP/1.1 200 OK"),
        ("LocalHost:8080", "HTTP/1.1 200 OK"),
        (socket.gethostname(), "HTTP/1.1 200 OK"),
        ("npu.example.:80", "HTTP/1.1 200 OK"),
        ("rebound.example", "HTTP/1.1 421 Misdirected Request"),
        ("rebound.example:8080", "HTTP/1.1 421 Misdirected Request"),
        ("localhost.rebound.example", "HTTP/1.1 421 Misdirected Request"),
        ("127.0.0.1.rebound.example", "HTTP/1.1 421 Misdirected Request"),
    ],
)
def test_strange_host_names_are_refused(server: HttpServer, host: str, status: str) -> None:
    """A web page whose name points here (DNS rebinding) reads nothing."""
    assert ask(server.address, host) == status


def test_the_setting_adds_host_names(start: Start) -> None:
    """--http-hosts, with commas."""
    address = start(http="127.0.0.1:0", http_hosts="one.example, two.example").http_address
    assert address is not None
    statuses = [ask(address, f"{name}.example") for name in ("one", "two", "three")]
    assert [status.split()[1] for status in statuses] == ["200", "200", "421"]


def test_http_is_announced_when_it_listens(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is slow to start its HTTP side has it when it tells the address."""
    startup = uvicorn.Server.startup

    async def slow_startup(self: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.sleep(0.3)
        await startup(self, sockets)

    monkeypatch.setattr(uvicorn.Server, "startup", slow_startup)
    address = start(http="127.0.0.1:0").http_address
    assert address is not None
    assert ask(address, "localhost") == "HTTP/1.1 200 OK"
