"""Places for sessions: taken once, given back by whoever does not want theirs any more."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from fake_backend import FakeBackend, Start, wait_until
from raw_client import Raw

from npu_server.seam import BackendOptions, Program, Ranges
from npu_server.service.servicer import NpuService
from npu_wire.v1 import npu_pb2
from trainer_client.npu.connection import connect

TIMEOUT_S = 30.0


class SlowCompiler(FakeBackend):
    """Compiles `b"slow"` when `compiled` is set."""

    def __init__(self) -> None:
        super().__init__(BackendOptions())
        self.compiling, self.compiled = threading.Semaphore(0), threading.Event()

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        if model == b"slow":
            self.compiling.release()
            assert self.compiled.wait(TIMEOUT_S)
        return super().compile(model, ranges)


@pytest.fixture
def slow() -> Iterator[SlowCompiler]:
    """A device whose compiler can be held up."""
    backend = SlowCompiler()
    yield backend
    backend.compiled.set()


def compile_requests(model: bytes) -> Iterator[npu_pb2.CompileRequest]:
    """A model without ranges."""
    yield npu_pb2.CompileRequest(header=npu_pb2.CompileHeader(model_bytes=len(model)))
    yield npu_pb2.CompileRequest(model_chunk=model)


def test_a_cancelled_compile_leaves_no_session(start: Start, slow: SlowCompiler) -> None:
    """Its place is free again and its program closed, as soon as the compiler lets go of it."""
    server = start(slow, max_sessions=1)
    raw = Raw(server.address)
    cancelled = raw.stub.Compile.future(compile_requests(b"slow"))
    assert slow.compiling.acquire(timeout=TIMEOUT_S)
    cancelled.cancel()
    raw.stub.Describe(
        npu_pb2.DescribeRequest()
    )  # on the same connection: the server has seen what came before
    slow.compiled.set()
    wait_until(lambda: slow.calls.count("program closed") == 1)
    raw.compile()
    assert server.sessions.count() == 1


def test_a_compile_that_waits_for_its_turn_gives_its_place_back_at_once(
    start: Start, slow: SlowCompiler
) -> None:
    """Of eight models four compile and four wait; all are cancelled, and the four places are free at once."""
    server = start(slow, max_sessions=8)
    raw = Raw(server.address)
    calls = [raw.stub.Compile.future(compile_requests(b"slow")) for _ in range(8)]
    for _ in range(4):
        assert slow.compiling.acquire(timeout=TIMEOUT_S)
    with pytest.raises(grpc.RpcError) as full:
        raw.compile()
    assert full.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not slow.compiling.acquire(blocking=False)
    for call in calls:
        call.cancel()

    def free() -> bool:
        try:
            raw.compile(b"crash")  # refused when its turn comes, or at once where no place is free
        except grpc.RpcError as error:
            return error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED
        return True

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_until, free, TIMEOUT_S)
        wait_until(
            lambda: (
                server.telemetry.registry.get_sample_value(
                    "npu_requests_total", {"method": "Compile", "code": "CANCELLED"}
                )
                == 4
            )
        )
        raw.stub.Describe(npu_pb2.DescribeRequest())  # behind the cancellations: all of them are known now
        slow.compiled.set()
        waiting.result(TIMEOUT_S)
    wait_until(lambda: slow.calls.count("program closed") == 4)
    assert server.sessions.count() == 0


def test_a_session_that_opens_takes_one_place(start: Start, backend: FakeBackend) -> None:
    """Eight clients open and release two sessions each, as many as there are places, again and again."""
    server = start(max_sessions=16)
    refused: list[grpc.RpcError] = []

    def come_and_go() -> None:
        raw = Raw(server.address)
        for _ in range(10):
            try:
                sessions = [raw.compile(), raw.compile()]
            except grpc.RpcError as error:
                refused.append(error)
                return
            for session_id in sessions:
                raw.stub.Release(npu_pb2.ReleaseRequest(session_id=session_id))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(come_and_go) for _ in range(8)]:
            done.result(TIMEOUT_S)
    assert refused == []


def test_a_compile_that_gave_way_is_made_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowd of newer calls may end one whose model is still on the way; the user sees nothing of it."""
    compile_, refused = NpuService.Compile, []

    def crowded(self: NpuService, requests: object, context: grpc.ServicerContext) -> object:
        if len(refused) < 2:
            refused.append(context)
            context.cancel()
        return compile_(self, requests, context)  # type: ignore[arg-type]

    monkeypatch.setattr(NpuService, "Compile", crowded)
    server = start(FakeBackend(BackendOptions()))
    with connect(server.address) as npu:
        npu.compile(b"model", {"t0": (-1.0, 1.0)})
        assert server.sessions.count() == 1
    assert len(refused) == 2
