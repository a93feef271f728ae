"""Attacks below gRPC: garbage on both ports, HTTP/2 frames by hand, and connections that break or stall."""

import random
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .foe import NPU, Foe
from .recordings import attach

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTLED = b"\0\0\0\4\0\0\0\0\0"  # an empty SETTINGS frame
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9


def http2_garbage(foe: Foe) -> str:
    """Bytes on the gRPC port that are no gRPC, or frames that no client would send."""
    rng = foe.rng
    kinds = {
        "noise": lambda: rng.randbytes(rng.choice((1, 100, 20_000))),
        "http1": lambda: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "random frames": lambda: _PREFACE + b"".join(_random_frame(rng) for _ in range(rng.randint(1, 20))),
        "lying length": lambda: _call(b"\0" + struct.pack(">I", rng.choice((5, 2**31, 2**32 - 1))) + b"abc"),
        "compressed": lambda: _call(b"\1" + struct.pack(">I", 4) + b"abcd"),
        "odd flag": lambda: _call(bytes([rng.randrange(2, 256)]) + struct.pack(">I", 0)),
        "half a prefix": lambda: _call(b"\0\0"),
        "rapid reset": lambda: (
            _PREFACE
            + _SETTLED
            + b"".join(
                _frame(_HEADERS, 4, 2 * i + 1, _request_headers()) + _frame(_RST, 0, 2 * i + 1, b"\0\0\0\x08")
                for i in range(rng.randint(5, 60))
            )
        ),
        "endless headers": lambda: (
            _PREFACE
            + _SETTLED
            + _frame(_HEADERS, 0, 1, _request_headers())
            + _frame(_CONTINUATION, 0, 1, _header("k", "v" * 1000)) * rng.randint(1, 50)
        ),
        "pings": lambda: _PREFACE + _SETTLED + _frame(_PING, 0, 0, bytes(8)) * 100,
        "settings": lambda: _PREFACE + _frame(_SETTINGS, 0, 0, struct.pack(">HI", 4, 0)) * 100,
        "windows": lambda: _call(b"") + _frame(_WINDOW, 0, 1, b"\x7f\xff\xff\xff") * 3,
        "goodbye": lambda: _PREFACE + _SETTLED + _frame(_GOAWAY, 0, 0, bytes(8)) + _call(b""),
    }
    name = rng.choice(list(kinds))
    return f"{name}: {_send(foe, foe.place.grpc, kinds[name]())}"


def http_garbage(foe: Foe) -> str:
    """Bytes on the dashboard's port: no HTTP, too much of it, too slow, or for another host."""
    rng = foe.rng
    host = f"127.0.0.1:{foe.place.http[1]}"
    get, post = (f"{verb} /healthz HTTP/1.1\r\nHost: {host}\r\n" for verb in ("GET", "POST"))
    kinds = {
        "noise": lambda: rng.randbytes(rng.choice((1, 100, 20_000))),
        "legal": lambda: (
            f"GET {rng.choice(('/healthz', '/metrics', '/api/v1/status'))} HTTP/1.1\r\n"
            f"Host: {host}\r\nConnection: close\r\n\r\n".encode()
        ),
        "unfinished": lambda: b"GET /healthz HTTP/1.1\r\nHost: ",
        "long path": lambda: b"GET /" + b"a" * rng.choice((1000, 70_000)) + b" HTTP/1.1\r\n\r\n",
        "long header": lambda: b"GET / HTTP/1.1\r\nX: " + b"b" * 70_000 + b"\r\n\r\n",
        "many headers": lambda: b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        "other host": lambda: b"GET /api/v1/status HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "huge body": lambda: f"{post}Content-Length: {10**12}\r\n\r\nabc".encode(),
        "bad chunks": lambda: f"{post}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
        "pipelined": lambda: f"{get}\r\n".encode() * 20,
        "escaped path": lambda: b"GET /..%2f..%2fetc/passwd%00%ff HTTP/1.1\r\nHost: x\r\n\r\n",
        "http2": lambda: _PREFACE + _SETTLED,
        "upgrade": lambda: (
            f"GET / HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        ),
    }
    name = rng.choice(list(kinds))
    return f"{name}: {_send(foe, foe.place.http, kinds[name]())}"


def connections(foe: Foe) -> str:
    """Sockets that are opened and say nothing, on either port, then vanish."""
    address = foe.rng.choice((foe.place.grpc, foe.place.http))
    sockets = [socket.create_connection(address, 5.0) for _ in range(foe.rng.randint(1, 20))]
    time.sleep(foe.rng.uniform(0.0, foe.longest_s / 4))
    for each in sockets:
        _end(foe.rng, each)
    return "done"


def broken_connection(foe: Foe) -> str:
    """A legal session through a wire that is cut, stalls, or changes a byte."""
    session_id = foe.open(foe.small)
    kind = foe.rng.choice(("cut", "stall", "flip"))
    up, after = foe.rng.random() < 0.7, foe.rng.randrange(1, 9000)
    with _relay(foe.place.grpc, kind, up, after) as port, foe.channel_to(f"127.0.0.1:{port}") as channel:
        messages = [attach(session_id), *foe.small.forward]
        outcome = foe.converse(
            NPU + "Forward", messages, patience_s=foe.rng.uniform(0.5, 4.0), channel=channel
        )
    foe.leave(session_id)
    return f"{kind}: {outcome.status}"


def _send(foe: Foe, address: tuple[str, int], data: bytes) -> str:
    """Sends, waits a little for what comes, and ends the connection in some way."""
    rng = foe.rng
    with socket.create_connection(address, 5.0) as each:
        each.settimeout(rng.choice((0.05, 0.3, 1.0)))
        received = b""
        try:
            if rng.random() < 0.2:  # in drips
                for at in range(0, min(len(data), 200), 20):
                    each.sendall(data[at : at + 20])
                    time.sleep(0.02)
            else:
                each.sendall(data)
            if rng.random() < 0.2:
                each.shutdown(socket.SHUT_WR)
            while len(received) < 2**20 and (piece := each.recv(65536)):
                received += piece
            said = "closed"
        except TimeoutError:
            said = "left open"
        except OSError as error:
            said = type(error).__name__
        _end(rng, each)
    return said


def _end(rng: random.Random, each: socket.socket) -> None:
    if rng.random() < 0.5:  # a reset instead of an orderly end
        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    each.close()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _random_frame(rng: random.Random) -> bytes:
    frame = _frame(
        rng.randrange(12),
        rng.randrange(256),
        rng.choice((0, 1, 2, 3, 2**31 - 1, 2**32 - 1)),
        rng.randbytes(rng.choice((0, 4, 5, 8, 100))),
    )
    return frame if rng.random() < 0.8 else rng.randbytes(3) + frame[3:]


def _header(name: str, value: str) -> bytes:
    """HPACK, literal without indexing."""
    size = len(value)
    length = bytes([size]) if size < 127 else b"\x7f" + _varint(size - 127)
    return b"\0" + bytes([len(name)]) + name.encode() + length + value.encode()


def _varint(value: int) -> bytes:
    result = b""
    while value > 127:
        result += bytes([value & 127 | 128])
        value >>= 7
    return result + bytes([value])


def _request_headers() -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": NPU + "Forward",
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return b"".join(_header(name, value) for name, value in fields.items())


def _call(body: bytes) -> bytes:
    """A call of Forward by hand, with a body that need not be one."""
    data = _frame(_DATA, 0, 1, body) if body else b""
    return _PREFACE + _SETTLED + _frame(_HEADERS, 4, 1, _request_headers()) + data


@contextmanager
def _relay(address: tuple[str, int], kind: str, up: bool, after: int) -> Iterator[int]:
    """Passes bytes on between a client and the server, until in one direction `after` bytes have passed."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            with client, socket.create_connection(address, 5.0) as server:
                _pass_on(client, server, kind, up, after, stop)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stop.set()
        thread.join()
        listener.close()


def _pass_on(
    client: socket.socket, server: socket.socket, kind: str, up: bool, after: int, stop: threading.Event
) -> None:
    passed = 0
    with selectors.DefaultSelector() as selector:
        selector.register(client, selectors.EVENT_READ, server)
        selector.register(server, selectors.EVENT_READ, client)
        while not stop.is_set():
            for key, _ in selector.select(0.1):
                source = key.fileobj
                assert isinstance(source, socket.socket)
                try:
                    data = bytearray(source.recv(65536))
                    if (source is client) is up and passed <= after < passed + len(data):
                        if kind == "flip":
                            data[after - passed] ^= 0x10
                        elif kind == "cut":
                            return
                        else:
                            stop.wait(5.0)
                            return
                    if (source is client) is up:
                        passed += len(data)
                    if not data:
                        return
                    key.data.sendall(data)
                except OSError:
                    return
