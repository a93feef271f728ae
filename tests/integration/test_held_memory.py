"""What the server holds for its clients: no more than it says, and nothing of a stream that has ended."""

import itertools
import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from fake_backend import LAYERS, FakeBackend, FakeProgram, Spawn, Start, expected, wait_until
from raw_client import Raw, attach, begin, memory_of, threads_of, weight_chunk

from npu_server.app import RunningServer
from npu_server.seam import BackendOptions, LayerTensor, Program
from npu_wire.layer_map import Array, Float32Array, Int8Array
from npu_wire.tensors import OutgoingTensor, TensorAssembler
from npu_wire.v1 import npu_pb2

MB = 10**6
BIG = np.ones((3, 1000, 1000), np.float32)


def large(seed: int = 0, size: int = 128) -> Int8Array:
    """64 samples, 2.1 MB: one chunk."""
    return np.random.default_rng(seed).integers(-128, 128, (64, 2, size, size), dtype=np.int8)


def batch(batch_id: int, data: Int8Array, version: int = 0) -> Iterator[npu_pb2.ForwardRequest]:
    """A batch that taps every layer."""
    outgoing = OutgoingTensor("t0", data)
    for offset in outgoing.offsets():
        request = npu_pb2.ForwardRequest()
        request.batch.batch_id, request.batch.weights_version = batch_id, version
        if offset == 0:
            request.batch.taps.extend(range(LAYERS))
        outgoing.write(request.batch.chunk, offset)
        yield request


def update(version: int, name: str, array: Float32Array) -> Iterator[npu_pb2.ForwardRequest]:
    """A weight update of one initializer."""
    yield begin(version, name)
    outgoing = OutgoingTensor(name, array)
    for offset in outgoing.offsets():
        request = npu_pb2.ForwardRequest()
        request.weight.weights_version = version
        outgoing.write(request.weight.chunk, offset)
        yield request


def tensors(answers: Iterator[npu_pb2.ForwardResponse]) -> dict[tuple[int, int], Int8Array]:
    """Every tensor by batch and layer."""
    found, assembler = {}, None
    for answer in answers:
        if answer.HasField("tensor"):
            assembler = assembler or TensorAssembler(answer.tensor.chunk, 100 * MB)
            whole = assembler.add(answer.tensor.chunk)
            if whole is not None:
                found[answer.batch_id, answer.tensor.layer], assembler = whole, None
    return found


def held(server: RunningServer) -> float:
    """What the metrics say."""
    value = server.telemetry.registry.get_sample_value("npu_held_bytes")
    assert value is not None
    return value


def calls_over(server: RunningServer) -> float:
    """Streams that have ended, whatever way."""
    samples = [s for family in server.telemetry.registry.collect() for s in family.samples]
    return sum(s.value for s in samples if s.name == "npu_requests_total" and s.labels["method"] == "Forward")


@pytest.fixture
def wide() -> Iterator[FakeBackend]:
    """A device whose batches of 64 samples have 2.1 MB, and 6.3 MB of answers."""
    backend = FakeBackend(BackendOptions(extra={"size": "128"}))
    yield backend
    backend.gate.set()


def test_memory_is_committed_as_bytes_come(spawn: Spawn, tmp_path: Path) -> None:
    """The first byte of a batch of 134 MB, of four sessions, costs none of 537 MB."""
    child = spawn("--backend-option", "size=1024")
    raw = Raw(f"unix:{tmp_path}/child.sock")
    first = next(batch(1, np.zeros((1, 2, 1024, 1024), np.int8)))
    first.batch.chunk.shape[0] = 64
    first.batch.chunk.data = b"x"
    before = memory_of(child)
    for _ in range(4):
        session_id = raw.compile()
        stream = raw.stub.Forward(itertools.chain([attach(session_id), first], raw.silence()))
        next(stream)
        # A second stream's answer comes after the device and the reader have seen the first one's.
        assert next(raw.stub.Forward(iter([attach(raw.compile())]))).HasField("attached")
    assert memory_of(child) - before < 60 * MB
    raw.ended.set()


def test_replaced_streams_end_and_are_freed_though_nobody_reads_them(spawn: Spawn, tmp_path: Path) -> None:
    """8 streams of one session, with 25 MB of answers each that their client never reads."""
    child = spawn("--backend-option", "size=256", "--stall-s", "1000")
    raw = Raw(f"unix:{tmp_path}/child.sock")
    session_id, data = raw.compile(), large(size=256)
    assert len(tensors(raw.stub.Forward(iter([attach(session_id), *batch(1, data)])))) == LAYERS
    before, threads = memory_of(child), threads_of(child)
    unread = []
    for _ in range(8):
        requests = itertools.chain([attach(session_id)], batch(1, data), raw.silence())
        unread.append(raw.stub.Forward(requests))
        assert next(unread[-1]).HasField("attached")
        assert next(unread[-1]).HasField("tensor")
    last = tensors(raw.stub.Forward(iter([attach(session_id), *batch(1, data)])))
    np.testing.assert_array_equal(expected(data, 2), last[1, 2])
    wait_until(lambda: memory_of(child) - before < 80 * MB)
    wait_until(lambda: threads_of(child) <= threads + 4)  # those that the pool keeps
    raw.ended.set()


@pytest.mark.parametrize("end", ["cancel", "release", "replace", "broken", "finished"])
def test_nothing_is_held_of_a_stream_that_has_ended(start: Start, wide: FakeBackend, end: str) -> None:
    """With two batches at the device, half a third one, and nothing read of it all."""
    server = start(wide)
    raw = Raw(server.address)
    session_id, data = raw.compile(), large()
    part = next(batch(3, data))
    part.batch.chunk.data = b"x" * 1000
    wide.gate.clear()
    requests = [attach(session_id), *batch(1, data), *batch(2, data), *([part] if end != "finished" else [])]
    tail = {"broken": iter([attach("x")]), "finished": iter([])}.get(end, raw.silence())
    stream = raw.stub.Forward(itertools.chain(requests, tail))
    next(stream)
    wide.layer_began.acquire()
    wait_until(lambda: held(server) >= 2 * data.nbytes)
    if end == "cancel":
        stream.cancel()
    elif end == "release":
        raw.stub.Release(npu_pb2.ReleaseRequest(session_id=session_id))
    replacement = raw.stub.Forward(iter([attach(session_id)])) if end == "replace" else iter([])
    wide.gate.set()
    assert [answer.WhichOneof("kind") for answer in replacement] in ([], ["attached"])
    if end in ("cancel", "release", "replace"):
        wait_until(lambda: calls_over(server) == (2 if end == "replace" else 1))
    if end == "broken":
        assert raw.error(stream)[1] == "InvalidInput"
    elif end == "finished":
        assert len(tensors(stream)) == 2 * LAYERS
    wait_until(lambda: held(server) == 0)
    raw.ended.set()


def test_a_client_that_sends_ahead_waits_and_loses_nothing(start: Start, wide: FakeBackend) -> None:
    """25 MB of batches and weights where 14 MB may be held: flow control, no refusal, and the right bits."""
    limit = 14 * MB
    server = start(wide, max_session_bytes=limit, max_in_flight=8)
    raw = Raw(server.address)
    data = [large(seed) for seed in range(6)]
    wide.gate.clear()
    requests = [
        attach(raw.compile()),
        *batch(1, data[0]),
        *update(1, "big", BIG),
        begin(2),
        weight_chunk(2, 3.0),
        *itertools.chain.from_iterable(batch(i + 1, data[i], 2) for i in range(1, 6)),
    ]
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(tensors, raw.stub.Forward(iter(requests)))
        wide.layer_began.acquire()
        wait_until(lambda: held(server) > limit - data[0].nbytes)
        assert held(server) <= limit
        wide.gate.set()
        found = answers.result(30)
    for i, codes in enumerate(data):
        np.testing.assert_array_equal(expected(codes, 2, 3 if i else 0), found[i + 1, 2])
    assert len(found) == 6 * LAYERS
    wait_until(lambda: held(server) == 0)


def test_a_device_does_not_fill_memory_with_answers_that_nobody_reads(
    start: Start, wide: FakeBackend
) -> None:
    """Of four batches with 6.3 MB of answers each, one layer is computed; the others as those are read."""
    server = start(wide, max_session_bytes=6 * MB)
    raw, neighbour = Raw(server.address), Raw(server.address)
    data = [large(seed) for seed in range(6)]
    stream = raw.stub.Forward(
        itertools.chain(
            [attach(raw.compile())], *(batch(i, codes) for i, codes in enumerate(data[:4], 1)), raw.silence()
        )
    )
    next(stream)
    wait_until(lambda: wide.calls.count("layer 0") == 1)
    other = tensors(neighbour.stub.Forward(iter([attach(neighbour.compile()), *batch(1, data[5])])))
    np.testing.assert_array_equal(expected(data[5], 2), other[1, 2])
    assert wide.calls.count("layer 2") == 1  # the neighbour's
    raw.ended.set()
    found = tensors(stream)
    for i in range(4):
        np.testing.assert_array_equal(expected(data[i], 2), found[i + 1, 2])


def flood(server: RunningServer, device: FakeBackend, count: int) -> grpc.Call:
    """A stream with so many batches that the device does not get on with; nobody reads it."""
    greedy = Raw(server.address)
    device.gate.clear()
    batches = itertools.chain.from_iterable(batch(i + 1, large(i)) for i in range(count))
    stream = greedy.stub.Forward(itertools.chain([attach(greedy.compile())], batches, greedy.silence()))
    next(stream)
    device.layer_began.acquire()
    wait_until(lambda: held(server) >= count * large().nbytes)
    return stream


def later(go: threading.Event, session_id: str, data: Int8Array) -> Iterator[npu_pb2.ForwardRequest]:
    """A stream that is attached at once, and a batch when it is time."""
    yield attach(session_id)
    go.wait()
    yield from batch(1, data)


def test_each_session_has_a_share_that_others_cannot_fill(start: Start, wide: FakeBackend) -> None:
    """Where one session holds its own quarter and most of the common half, another still has its quarter."""
    server = start(
        wide, max_sessions=2, max_model_bytes=MB, max_server_bytes=10 * MB, max_session_bytes=10 * MB
    )
    modest, go, data = Raw(server.address), threading.Event(), large(9)
    served = modest.stub.Forward(later(go, modest.compile(), data))
    assert next(served).HasField("attached")
    unread = flood(server, wide, 3)
    go.set()
    wait_until(lambda: held(server) >= 4 * data.nbytes)
    wide.gate.set()
    np.testing.assert_array_equal(expected(data, 2), tensors(served)[1, 2])
    unread.cancel()


def test_who_finds_the_server_full_is_told_so(start: Start, wide: FakeBackend) -> None:
    """Beyond its share a stream waits for as long as the patience, and ends with the remedy."""
    server = start(
        wide,
        max_sessions=2,
        max_model_bytes=MB,
        max_server_bytes=4 * MB,
        max_session_bytes=4 * MB,
        stall_s=0.5,
    )
    modest, go = Raw(server.address), threading.Event()
    refused = modest.stub.Forward(later(go, modest.compile(), large(9)))
    assert next(refused).HasField("attached")
    unread = flood(server, wide, 1)
    go.set()
    wide.gate.set()
    code, name, details = modest.error(refused)
    assert (code, name) == ("RESOURCE_EXHAUSTED", "QuotaExceeded")
    assert "--max-server-bytes" in details
    unread.cancel()


class Watched(FakeBackend):
    """Notes the thread that ends a pass."""

    def compile(self, model: bytes, ranges: Mapping[str, tuple[float, float]]) -> Program:
        """Any model."""
        return WatchedProgram(self)


class WatchedProgram(FakeProgram):
    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        try:
            yield from super().forward(inputs, taps)
        finally:
            self.backend.note("pass ended")


@pytest.mark.parametrize("end", ["read", "cancel", "release", "replace"])
def test_a_batch_stops_in_the_middle_while_nobody_reads_it(start: Start, end: str) -> None:
    """Room for one layer's answer: the next is computed when that is read, or the device ends the pass."""
    device = Watched(BackendOptions(extra={"size": "256"}))
    server = start(device, max_session_bytes=9 * MB)
    raw, neighbour = Raw(server.address), Raw(server.address)
    session_id, data = raw.compile(), large(1, 256)
    stream = raw.stub.Forward(itertools.chain([attach(session_id)], batch(1, data), raw.silence()))
    next(stream)
    wait_until(lambda: device.calls.count("layer 0") == 1)
    other = tensors(neighbour.stub.Forward(iter([attach(neighbour.compile()), *batch(1, large(5, 256)[:8])])))
    np.testing.assert_array_equal(expected(large(5, 256)[:8], 2), other[1, 2])
    assert device.calls.count("layer 2") == 1  # the neighbour's
    assert held(server) <= 9 * MB + data.nbytes
    if end == "read":
        raw.ended.set()
        np.testing.assert_array_equal(expected(data, 2), tensors(stream)[1, 2])
    elif end == "cancel":
        stream.cancel()
    elif end == "release":
        raw.stub.Release(npu_pb2.ReleaseRequest(session_id=session_id))
    else:
        again = tensors(raw.stub.Forward(iter([attach(session_id), *batch(1, large(6, 256)[:8])])))
        np.testing.assert_array_equal(expected(large(6, 256)[:8], 2), again[1, 2])
    wait_until(lambda: device.calls.count("pass ended") == (3 if end == "replace" else 2))
    wait_until(lambda: held(server) == 0)
    assert len(device.threads) == 1
    raw.ended.set()
