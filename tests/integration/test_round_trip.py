"""Batches, weights and layers over a real socket."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from fake_backend import LAYERS, FakeBackend, Start, expected

from npu_server.seam import BackendOptions
from npu_wire.layer_map import Int8Array
from trainer_client.npu.connection import Connection, connect

RANGES = {"t0": (-1.0, 1.0)}


def test_every_layer_arrives_bit_for_bit(npu: Connection, batch: Int8Array) -> None:
    """Each tapped layer equals the sum done by hand."""
    session = npu.compile(b"model", RANGES)
    pending = session.submit({"t0": batch}, range(LAYERS))
    for layer in range(LAYERS):
        np.testing.assert_array_equal(expected(batch, layer), pending.tensor(layer))


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:0"])
def test_tcp_serves_on_a_port_of_the_systems_choice(start: Start, batch: Int8Array, listen: str) -> None:
    """Port 0 is answered with a real one."""
    server = start(listen=listen)
    assert not server.address.endswith(":0")
    with connect(server.address) as npu:
        last = npu.compile(b"model", RANGES).submit({"t0": batch}, ()).tensor(LAYERS - 1)
    np.testing.assert_array_equal(expected(batch, LAYERS - 1), last)


def test_tensors_larger_than_a_chunk_keep_their_channels_last_order(start: Start) -> None:
    """A 10 MB tensor comes in several chunks, whole, and as a transposed view."""
    fake = FakeBackend(BackendOptions(extra={"size": "400"}))
    big = np.random.default_rng(2).integers(-128, 128, (32, 2, 400, 400), dtype=np.int8)
    with connect(start(fake).address) as npu:
        pending = npu.compile(b"model", RANGES).submit({"t0": big}, [0])
        first = pending.tensor(0)
    np.testing.assert_array_equal(expected(big, 0), first)
    assert np.moveaxis(first, 1, -1).flags.c_contiguous
    assert not first.flags.writeable


def test_a_batch_runs_with_the_weights_pushed_before_it(npu: Connection, batch: Int8Array) -> None:
    """Batches sent back to back each see their own weights."""
    session = npu.compile(b"model", RANGES)
    pending = []
    for value in range(6):
        session.push_weights({"bias": np.array(value, np.float32)})
        pending.append(session.submit({"t0": batch}, ()))
    for value, answer in enumerate(pending):
        np.testing.assert_array_equal(expected(batch, 2, bias=value), answer.tensor(2))


def test_weights_larger_than_a_chunk_arrive(npu: Connection, batch: Int8Array) -> None:
    """An initializer of 12 MB travels beside a scalar one."""
    session = npu.compile(b"model", RANGES)
    session.push_weights({"big": np.ones((3, 1000, 1000), np.float32), "bias": np.array(7, np.float32)})
    np.testing.assert_array_equal(expected(batch, 2, bias=7), session.submit({"t0": batch}, ()).tensor(2))


def test_only_tapped_layers_are_sent(npu: Connection, batch: Int8Array) -> None:
    """The last layer always comes; one that was not tapped is an error at once."""
    pending = npu.compile(b"model", RANGES).submit({"t0": batch}, [1])
    pending.tensor(1)
    pending.tensor(2)
    assert [timing.layer for timing in pending.timings()] == [1, 2]
    with pytest.raises(ValueError, match="layer 0 was not tapped"):
        pending.tensor(0)


def test_layers_arrive_while_the_device_works_on_the_next(
    npu: Connection, backend: FakeBackend, batch: Int8Array
) -> None:
    """The device begins a layer only when the client has the one before; a tensor held back never comes."""
    arrived = threading.Semaphore(1)
    backend.before_layer = lambda layer: arrived.acquire()
    pending = npu.compile(b"model", RANGES).submit({"t0": batch}, range(LAYERS))
    for layer in range(LAYERS):
        np.testing.assert_array_equal(expected(batch, layer), pending.tensor(layer))
        arrived.release()


class ServersClock:
    """A clock that does not tell our time, and can be set."""

    def __init__(self) -> None:
        self.ahead_ns = 10**15

    def monotonic_ns(self) -> int:
        return time.monotonic_ns() + self.ahead_ns


@pytest.mark.parametrize("drift_ns", [-(10**10), 10**10])
def test_timings_stay_in_the_clients_clock(
    start: Start, batch: Int8Array, monkeypatch: pytest.MonkeyPatch, drift_ns: int
) -> None:
    """While the server's clock runs away, no layer begins before its batch was sent or ends after it came."""
    clock = ServersClock()
    monkeypatch.setattr("npu_server.service.servicer.time", clock)
    monkeypatch.setattr("fake_backend.time", clock)
    with connect(start().address) as npu:
        session = npu.compile(b"model", RANGES)
        for _ in range(3):
            before_ns = time.monotonic_ns()
            pending = session.submit({"t0": batch}, range(LAYERS))
            pending.tensor(LAYERS - 1)
            for timing in pending.timings():
                assert before_ns <= timing.npu_start_ns <= timing.npu_end_ns <= timing.arrival_ns
            clock.ahead_ns += drift_ns


def test_two_sessions_share_the_device(npu: Connection, backend: FakeBackend, batch: Int8Array) -> None:
    """Each session gets its own answers, and all calls of the device come from one thread."""
    one, two = npu.compile(b"model", RANGES), npu.compile(b"model", RANGES)
    one.push_weights({"bias": np.array(1, np.float32)})
    two.push_weights({"bias": np.array(2, np.float32)})
    answers = [(s.submit({"t0": batch}, ()), bias) for _ in range(5) for s, bias in ((one, 1), (two, 2))]
    for pending, bias in answers:
        np.testing.assert_array_equal(expected(batch, 2, bias=bias), pending.tensor(2))
    assert len(backend.threads) == 1


def test_connecting_imports_no_torch() -> None:
    """The network side stays usable where torch is not installed."""
    code = "import sys; from trainer_client import connect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
