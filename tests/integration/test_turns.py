"""Several clients on one device: none of them waits for more than a step of another's work."""

import itertools
import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_backend import FakeBackend, FakeProgram, Start, expected, wait_until
from raw_client import Raw, attach, input_chunk

from npu_server.seam import Awaited, BackendOptions, LayerTensor, Program, Ranges, WeightsOnTheWay
from npu_server.service import device
from npu_server.service.worker import DeviceWorker
from npu_wire.layer_map import Array, Float32Array, Int8Array
from npu_wire.v1 import npu_pb2
from trainer_client.npu.connection import connect

RANGES = {"t0": (-1.0, 1.0)}
TIMEOUT_S = 30.0


class SlowCompiler(FakeBackend):
    """Compiles `b"slow"` when `compiled` is set."""

    def __init__(self) -> None:
        super().__init__(BackendOptions())
        self.compiling, self.compiled = threading.Event(), threading.Event()

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        if model == b"slow":
            self.compiling.set()
            assert self.compiled.wait(TIMEOUT_S)
        return super().compile(model, ranges)


def test_a_batch_is_answered_while_another_clients_model_compiles(start: Start, batch: Int8Array) -> None:
    """Compiling holds up neither batches nor another model."""
    backend = SlowCompiler()
    server = start(backend)
    clients = connect(server.address, timeout_s=TIMEOUT_S), connect(server.address)
    with clients[0] as other, clients[1] as npu, ThreadPoolExecutor() as pool:
        slow = pool.submit(other.compile, b"slow", RANGES)
        try:
            assert backend.compiling.wait(TIMEOUT_S)
            answer = npu.compile(b"model", RANGES).submit({"t0": batch}, ()).tensor(2)
        finally:
            backend.compiled.set()
        np.testing.assert_array_equal(expected(batch, 2), answer)
        last = slow.result(TIMEOUT_S).submit({"t0": batch}, ()).tensor(2)
        np.testing.assert_array_equal(expected(batch, 2), last)


@pytest.fixture
def equal_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the device's clock every step takes a second."""
    clock = map(float, itertools.count()).__next__
    monkeypatch.setattr(device, "DeviceWorker", lambda: DeviceWorker(clock))


@pytest.mark.usefixtures("equal_steps")
def test_sessions_take_turns_layer_by_layer(start: Start, backend: FakeBackend, batch: Int8Array) -> None:
    """The second session's batch runs between the layers of the first one's; bits and order stay."""
    server = start()
    with connect(server.address) as one, connect(server.address) as two:
        first, second = one.compile(b"model", RANGES), two.compile(b"model", RANGES)
        for session in (first, second):
            session.submit({"t0": batch}, ()).tensor(2)  # so both streams are open
        backend.calls.clear()
        backend.gate.clear()
        while backend.layer_began.acquire(blocking=False):
            pass
        long = first.submit({"t0": batch}, range(3))
        assert backend.layer_began.acquire(timeout=TIMEOUT_S)
        short = second.submit({"t0": batch - 1}, ())
        wait_until(lambda: server.status().queue_depth == 1)
        backend.gate.set()
        for layer in range(3):
            np.testing.assert_array_equal(expected(batch, layer), long.tensor(layer))
        np.testing.assert_array_equal(expected(batch - 1, 2), short.tensor(2))
    assert backend.calls[:8] == ["forward", "layer 0"] * 2 + ["layer 1"] * 2 + ["layer 2"] * 2


class SlowProgram(FakeProgram):
    """Prepares weights in three steps."""

    def begin_weights(self, names: Collection[str]) -> WeightsOnTheWay:
        return SlowWeights(self)


class SlowWeights:
    def __init__(self, program: SlowProgram) -> None:
        self.program = program
        self.loaded = False
        self.tensors: dict[str, Float32Array] = {}

    def take(self, name: str, array: Float32Array) -> Iterator[None]:
        self.tensors[name] = array
        for step in range(3):
            self.program.backend.note(f"step {step}")
            self.program.backend.layer_began.release()
            self.program.backend.gate.wait()
            yield

    def forward(
        self, inputs: Mapping[str, Array], taps: Collection[int]
    ) -> Iterator[LayerTensor | Awaited | None]:
        while not self.loaded:
            yield Awaited(0)
        yield from self.program.forward(inputs, taps)

    def finish(self) -> None:
        self.program.load_weights(self.tensors)
        self.loaded = True


class SlowLoader(FakeBackend):
    """Its programs take long to prepare weights."""

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        return SlowProgram(self)


@pytest.mark.usefixtures("equal_steps")
def test_a_batch_is_answered_between_the_steps_of_a_weight_update(start: Start, batch: Int8Array) -> None:
    """Preparing one client's weights holds nobody up, and they count when all is done."""
    backend = SlowLoader(BackendOptions())
    server = start(backend)
    with connect(server.address) as one, connect(server.address) as two:
        first, second = one.compile(b"model", RANGES), two.compile(b"model", RANGES)
        second.submit({"t0": batch}, ()).tensor(2)  # so its stream is open
        while backend.layer_began.acquire(blocking=False):
            pass
        backend.gate.clear()
        backend.calls.clear()
        first.push_weights({"bias": np.array(5, np.float32)})
        assert backend.layer_began.acquire(timeout=TIMEOUT_S)
        other = second.submit({"t0": batch}, ())
        wait_until(lambda: server.status().queue_depth == 1)
        backend.gate.set()
        np.testing.assert_array_equal(expected(batch, 2), other.tensor(2))
        np.testing.assert_array_equal(expected(batch, 2, bias=5), first.submit({"t0": batch}, ()).tensor(2))
    steps = ["step 0", "forward", "layer 0", "step 1", "layer 1", "step 2", "layer 2", "load_weights"]
    assert backend.calls[: len(steps)] == steps


@pytest.fixture
def raw(start: Start) -> Iterator[Raw]:
    """A client that speaks the protocol by hand."""
    client = Raw(start().address)
    yield client
    client.ended.set()
    client.channel.close()


@pytest.mark.parametrize("end", ["cancel", "release", "replace"])
def test_a_batch_without_taps_stops_at_the_next_layer(raw: Raw, backend: FakeBackend, end: str) -> None:
    """Of a stream that is cancelled, replaced, or whose session is released, no further layer is begun."""
    session_id = raw.compile()
    backend.gate.clear()
    call = raw.stub.Forward(itertools.chain([attach(session_id), input_chunk()], raw.silence()))
    next(call)
    assert backend.layer_began.acquire(timeout=TIMEOUT_S)
    later = iter([attach(session_id if end == "replace" else raw.compile()), input_chunk()])
    if end == "cancel":
        over = threading.Event()
        call.add_done_callback(lambda _: over.set())
        call.cancel()
        assert over.wait(TIMEOUT_S)
        raw.stub.Release(npu_pb2.ReleaseRequest(session_id=session_id))
    elif end == "release":
        raw.stub.Release(npu_pb2.ReleaseRequest(session_id=session_id))
    answers = raw.stub.Forward(later)
    if end == "replace":
        assert raw.error(call)[1] == "SessionLost"
    backend.gate.set()
    assert [answer.WhichOneof("kind") for answer in answers] == ["attached", "tensor", "done"]
    assert [backend.calls.count(f"layer {k}") for k in range(3)] == [2, 1, 1]
