"""What nobody refers to any more is given back: sessions, threads, descriptors, the embedded server."""

import gc
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from embedded_backends import diary
from fake_backend import FakeBackend, Spawn, expected, wait_until
from test_embedded import RANGES, ends
from torch import nn

from npu_wire.errors import QuotaExceeded
from npu_wire.layer_map import Int8Array
from trainer_client.npu.connection import Connection, connect
from trainer_client.qat.calibrate import observe
from trainer_client.qat.capture import capture
from trainer_client.qat.module import QatModule, prepare


@pytest.fixture
def without_gc() -> Iterator[None]:
    """Only what reference counts free is freed: nothing may wait for the garbage collector."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_gc")
def test_a_session_is_released_when_nobody_refers_to_it(npu: Connection) -> None:
    """At once, and its thread ends."""
    session = npu.compile(b"model", RANGES)
    (reader,) = [thread for thread in threading.enumerate() if thread.name == "npu-session"]
    del session
    reader.join(60)
    assert not reader.is_alive()


def test_a_batch_keeps_its_session(npu: Connection, backend: FakeBackend, batch: Int8Array) -> None:
    """Nobody refers to the session itself, and the answer still comes."""
    backend.gate.clear()
    pending = npu.compile(b"model", RANGES).submit({"t0": batch}, ())
    gc.collect()
    backend.gate.set()
    np.testing.assert_array_equal(expected(batch, 2), pending.tensor(2))


def test_a_place_is_free_once_its_session_is_dropped(
    spawn: Spawn, tmp_path: os.PathLike[str], batch: Int8Array
) -> None:
    """A server process with one place: the next session gets it, not a refusal; a held one keeps it."""
    spawn("--max-sessions", "1")
    with connect(f"unix:{tmp_path}/child.sock", timeout_s=20) as npu:
        for _ in range(20):
            session = npu.compile(b"model", RANGES)
            np.testing.assert_array_equal(expected(batch, 2), session.submit({"t0": batch}, ()).tensor(2))
            session = None
        held = npu.compile(b"model", RANGES)
        with pytest.raises(QuotaExceeded):
            npu.compile(b"model", RANGES)
        np.testing.assert_array_equal(expected(batch, 2), held.submit({"t0": batch}, ()).tensor(2))


@pytest.mark.usefixtures("without_gc")
def test_an_embedded_server_ends_when_nobody_refers_to_its_connection(plugin: None, batch: Int8Array) -> None:
    """A session keeps it; without one it stops in order: the device is closed and the folder removed."""
    npu = connect(backend="fake")
    server = npu.embedded
    assert server is not None
    pid, path = server.pid, server.endpoint.path
    session = npu.compile(b"model", RANGES)
    del npu
    np.testing.assert_array_equal(expected(batch, 2), session.submit({"t0": batch}, ()).tensor(2))
    del session
    assert ends(pid)
    assert diary()[-1] == "close"
    wait_until(lambda: not os.path.exists(os.path.dirname(path)))


def test_a_connection_in_a_cycle_is_given_back_by_the_garbage_collector(plugin: None) -> None:
    """In whatever thread that runs."""
    npu = connect(backend="fake")
    assert npu.embedded is not None
    pid = npu.embedded.pid
    npu.me = npu  # type: ignore[attr-defined]
    del npu
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()
    assert ends(pid)


@pytest.mark.slow
@pytest.mark.usefixtures("without_gc")
def test_a_hundred_prepared_models_leave_nothing_behind() -> None:
    """Each trains a step on an embedded server and is dropped; then the server is dropped, too.

    The model is captured twice and prepared from that a hundred times: `prepare` is the two together.
    """
    before = {thread for thread in threading.enumerate() if thread.name.startswith("npu-")}
    npu = connect(backend="reference")
    assert npu.embedded is not None
    pid = npu.embedded.pid
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    qat = prepare(net, x, npu).calibrate(x)
    captured = capture(net, x)
    ranges = observe(captured, x)

    def used() -> tuple[int, int]:
        threads = sum(thread.name == "npu-session" for thread in threading.enumerate())
        return threads, len(os.listdir("/proc/self/fd"))

    qat(x).sum().backward()
    idle = used()
    for _ in range(100):
        qat = QatModule(captured, npu, ranges=ranges)
        qat(x).sum().backward()
    wait_until(lambda: used() == idle)
    del npu, qat
    gc.collect()  # torch.export's own cycles hold the frame of `prepare`
    assert ends(pid)
    wait_until(lambda: {t for t in threading.enumerate() if t.name.startswith("npu-")} <= before)
