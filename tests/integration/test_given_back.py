"""What nobody refers to any more is given back: sessions, threads, descriptors, the embedded server."""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from embedded_backends import diary
from fake_backend import FakeBackend, Spawn, Start, expected, wait_until
from test_embedded import RANGES, ends
from torch import nn

from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import BackendOptions
from npu_wire.errors import QuotaExceeded
from npu_wire.layer_map import Int8Array
from trainer_client.npu.connection import Connection, connect
from trainer_client.qat.module import prepare


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
def test_a_hundred_prepared_models_leave_nothing_behind(start: Start) -> None:
    """Each is prepared, calibrated, trained for a step and dropped, as a notebook cell that runs again.

    A megabyte of weights a model: what stayed of eighty of them would be seen in the memory of the process.
    """
    server = start(ReferenceBackend(BackendOptions(profile="tflm")))
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1))

    def threads() -> int:
        return sum(thread.name == "npu-session" for thread in threading.enumerate())

    with connect(server.address, timeout_s=60) as npu:
        for times in range(100):
            qat = prepare(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2)), x, npu)
            qat.calibrate(x)
            qat(x).sum().backward()
            del qat
            wait_until(lambda: server.sessions.count() == 0 and threads() == 0)
            if times == 19:
                used, descriptors = _resident_mb(), len(os.listdir("/proc/self/fd"))
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
        gc.collect()  # torch.export leaves cycles
        assert _resident_mb() < used + 40


def _resident_mb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


TRAINS = """
import os, signal, sys
import torch
from torch import nn
from trainer_client import connect, prepare

# As at a terminal: a shell starts what it runs in the background with interrupts ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
x = torch.randn(5, 3)
net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
qat = prepare(net, x, connect(sys.argv[1])).calibrate(x)
optimizer = torch.optim.SGD(net.parameters(), 0.1)
while True:
    qat(x).sum().backward()
    optimizer.step()
    print("step", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_session_of_a_trainer_that_is_ended_is_given_back(start: Start, number: signal.Signals) -> None:
    """A process that trains on a server elsewhere is told to end, or killed, in the middle of a step."""
    server = start(ReferenceBackend(BackendOptions(profile="tflm")), lease_s=2.0)
    code = [sys.executable, "-c", TRAINS, server.address]
    with subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as trainer:
        assert trainer.stdout is not None
        for _ in range(3):
            assert trainer.stdout.readline() == "step\n"
        assert server.sessions.count() == 1
        trainer.send_signal(number)
        trainer.communicate(timeout=60)
    wait_until(lambda: server.sessions.count() == 0)
