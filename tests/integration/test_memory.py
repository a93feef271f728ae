"""What a client leaves behind when it goes: nothing, and that without the garbage collector."""

import gc
import itertools
import threading
import weakref
from collections.abc import Iterator

import pytest
from fake_backend import FakeBackend, FakeProgram, Start, wait_until
from raw_client import Raw, attach, begin, input_chunk, weight_chunk

from npu_server.seam import BackendOptions, Program, Ranges
from npu_wire.errors import DeviceFault, InvalidInput
from npu_wire.v1 import npu_pb2

TIMEOUT_S = 60.0


class Remembering(FakeBackend):
    """Knows which of its programs are alive."""

    def __init__(self) -> None:
        super().__init__(BackendOptions())
        self.programs: weakref.WeakSet[FakeProgram] = weakref.WeakSet()

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        program = super().compile(model, ranges)
        assert isinstance(program, FakeProgram)
        self.programs.add(program)
        return program


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only reference counts free memory, so a cycle shows."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "end", ["cancel", "cancel in a layer", "release", "replace", "bad", "fault", "refused"]
)
@pytest.mark.usefixtures("no_collector")
def test_a_stream_that_ends_keeps_no_program(start: Start, end: str) -> None:
    """However it ends, its session's program is gone when the session is released."""
    backend = Remembering()
    server = start(backend)
    raw = Raw(server.address)
    try:
        session_id = raw.compile()
        run(raw, backend, session_id, end)
        wait_until(lambda: not any(session.attached for session in server.status().sessions))
        raw.stub.Release(npu_pb2.ReleaseRequest(session_id=session_id))
        wait_until(lambda: not backend.programs)
    finally:
        backend.gate.set()
        raw.ended.set()
        raw.channel.close()


def run(raw: Raw, backend: Remembering, session_id: str, end: str) -> None:
    """Opens a stream and ends it."""
    messages = [attach(session_id), begin(1), weight_chunk(1), input_chunk(1, 1, taps=[0, 1, 2])]
    if end == "bad":
        messages += [input_chunk(1, 1)]
    elif end == "refused":
        backend.refuse_weights = InvalidInput("the folded weight is infinite")
    elif end == "fault":
        backend.fail_with = DeviceFault("no answer from the board")
    elif end == "cancel in a layer":
        backend.gate.clear()
    call = raw.stub.Forward(itertools.chain(messages, raw.silence()))
    if end in ("bad", "fault", "refused"):
        raw.error(call)
        backend.fail_with = backend.refuse_weights = None
        return
    next(call)
    if end == "cancel in a layer":
        assert backend.layer_began.acquire(timeout=TIMEOUT_S)
    elif end == "release":
        raw.stub.Release(npu_pb2.ReleaseRequest(session_id=session_id))
        raw.error(call)
    elif end == "replace":
        assert len(list(raw.stub.Forward(iter([attach(session_id)])))) == 1
        raw.error(call)
    over = threading.Event()
    call.add_done_callback(lambda _: over.set())
    call.cancel()
    assert over.wait(TIMEOUT_S) or call.done()
    backend.gate.set()
