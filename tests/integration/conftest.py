"""A real server on a unix socket, and a connection to it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_backend import FakeBackend, Start

from npu_server.app import RunningServer, serve
from npu_server.backends.base import BackendOptions
from npu_server.config import ServeConfig
from npu_wire.layer_map import Int8Array
from trainer_client.connection import Connection, connect


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
def npu(start: Start) -> Iterator[Connection]:
    """A connection to a server with defaults."""
    with connect(start().address, timeout_s=20) as connection:
        yield connection


@pytest.fixture
def batch() -> Int8Array:
    """Five samples of random codes."""
    return np.random.default_rng(1).integers(-128, 128, (5, 2, 4, 4), dtype=np.int8)
