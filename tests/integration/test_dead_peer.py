"""A peer that is gone without a word: its machine lost power, or the link was cut."""

import itertools
import selectors
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_backend import FakeBackend, Start, wait_until
from raw_client import Raw, attach

from npu_server import app
from npu_server.app import RunningServer
from npu_wire import channel
from npu_wire.errors import ServerUnavailable
from npu_wire.layer_map import Int8Array
from trainer_client.npu.connection import connect

RANGES = {"t0": (-1.0, 1.0)}
# As set, a peer is missed after half a minute; the test lets time run faster.
FASTER = 10
TIMEOUT_S = 30.0


class Link:
    """A TCP line to an address that can be cut: then neither end hears anything, not even that it is cut."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stop, self._wake = socket.socketpair()
        self._sockets: list[socket.socket] = [self._listener, self._stop, self._wake]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """From now on nothing passes."""
        self._wake.send(b"x")
        self._thread.join()

    def close(self) -> None:
        """Closes all sockets."""
        if self._thread.is_alive():
            self.cut()
        for one in self._sockets:
            one.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._stop, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._stop:
                        return
                    if key.fileobj is self._listener:
                        near, far = self._listener.accept()[0], socket.create_connection(self._target)
                        self._sockets += [near, far]
                        selector.register(near, selectors.EVENT_READ, far)
                        selector.register(far, selectors.EVENT_READ, near)
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        if data := key.fileobj.recv(65536):
                            key.data.sendall(data)
                        else:
                            selector.unregister(key.fileobj)


@pytest.fixture
def server(start: Start, monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    """A server; on both ends of its connections time runs faster."""

    def faster(options: channel.Options) -> channel.Options:
        return [
            (
                name,
                value // FASTER
                if name.endswith("_ms") and ("keepalive" in name or "ping" in name)
                else value,
            )
            for name, value in options
        ]

    at_server, at_client = channel.server_options(), channel.client_options()
    monkeypatch.setattr(app, "server_options", lambda: faster(at_server))
    monkeypatch.setattr(channel, "client_options", lambda: faster(at_client))
    return start(listen="127.0.0.1:0")


@pytest.fixture
def link(server: RunningServer) -> Iterator[Link]:
    """A line to it."""
    line = Link(server.address)
    yield line
    line.close()


def test_the_server_misses_a_client(server: RunningServer, link: Link) -> None:
    """Its stream ends, so that its session's lease begins to run."""
    raw = Raw(link.address)
    call = raw.stub.Forward(itertools.chain([attach(raw.compile())], raw.silence()))
    assert next(call).WhichOneof("kind") == "attached"
    assert server.status().sessions[0].attached
    link.cut()
    wait_until(lambda: not server.status().sessions[0].attached, TIMEOUT_S)
    raw.ended.set()
    raw.channel.close()


def test_the_client_misses_a_server(link: Link, backend: FakeBackend, batch: Int8Array) -> None:
    """Whoever waits for a batch hears that the server is gone."""
    with ThreadPoolExecutor() as pool, connect(link.address, reconnect_timeout_s=0.1) as npu:
        backend.gate.clear()
        pending = npu.compile(b"model", RANGES).submit({"t0": batch}, ())
        assert backend.layer_began.acquire(timeout=TIMEOUT_S)
        link.cut()
        assert isinstance(pool.submit(pending.tensor, 2).exception(TIMEOUT_S), ServerUnavailable)
