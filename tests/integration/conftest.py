"""A real server on a unix socket, and a connection to it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_backend import FakeBackend, Spawn, Start
from raw_client import Raw

from npu_server.app import RunningServer, serve
from npu_server.config import ServeConfig
from npu_server.seam import BackendOptions
from npu_wire.layer_map import Int8Array
from trainer_client.npu.connection import Connection, connect


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    """A device; never left hanging."""
    fake = FakeBackend(BackendOptions())
    yield fake
    fake.gate.set()


@pytest.fixture
def start(tmp_path: Path, backend: FakeBackend) -> Iterator[Start]:
    """Starts servers that stop at the end of the test; settings are keyword arguments."""
    running: list[RunningServer] = []

    def start_server(device: FakeBackend = backend, **settings: object) -> RunningServer:
        defaults = {"listen": f"unix:{tmp_path}/npu.sock", "http": "off", "grace_s": 5.0}
        server = serve(device, ServeConfig.model_validate(defaults | settings))
        running.append(server)
        return server

    yield start_server
    backend.gate.set()
    for server in running:
        server.close()


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the fake backend for child processes, the way a vendor's package would."""
    metadata = tmp_path / "site" / "fake_npu-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-npu\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[npu_server.backends]\n"
        "fake = embedded_backends:Diarist\n"
        "deadly = embedded_backends:Deadly\n"
        "chatty = embedded_backends:Chatty\n"
    )
    monkeypatch.setenv("FAKE_DIARY", str(tmp_path / "diary"))
    paths = [str(metadata.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.fixture
def spawn(plugin: None, tmp_path: Path) -> Iterator[Spawn]:
    """Starts `npu-server serve` with the fake backend in a process of its own, and waits until it listens."""
    children: list[subprocess.Popen[str]] = []

    def spawn_server(*flags: str, listen: str = f"unix:{tmp_path}/child.sock") -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "npu_server", "serve", "--backend", "fake", "--listen", listen]
        child = subprocess.Popen([*command, "--http", "off", *flags], stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline().startswith("listening on")
        return child

    yield spawn_server
    for child in children:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


@pytest.fixture(autouse=True)
def hang_up() -> Iterator[None]:
    """Ends the calls of clients that break rules; their senders would keep the process."""
    yield
    while Raw.opened:
        Raw.opened.pop().close()


@pytest.fixture
def npu(start: Start) -> Iterator[Connection]:
    """A connection to a server with defaults."""
    with connect(start().address, timeout_s=20) as connection:
        yield connection


@pytest.fixture
def batch() -> Int8Array:
    """Five samples of random codes."""
    return np.random.default_rng(1).integers(-128, 128, (5, 2, 4, 4), dtype=np.int8)
