"""Clients that say nothing, read nothing or send garbage: the others are served, and nothing of it stays."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from fake_backend import FakeBackend, Spawn, Start, wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from raw_client import Raw, attach, begin, input_chunk, memory_of, weight_chunk

from npu_wire.channel import status_parts
from npu_wire.v1 import npu_pb2

NPU = "/npu_wire.v1.NpuService/"
METHODS = (
    f"{NPU}Describe",
    f"{NPU}Compile",
    f"{NPU}Forward",
    f"{NPU}KeepAlive",
    f"{NPU}Release",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/List",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
GARBAGE = b"\x0a\xff\xff\xff\xff\x0f"
LIMIT_S = 20.0


def call(channel: grpc.Channel, method: str, messages: Iterator[bytes]) -> grpc.Call:
    """A call of raw bytes."""
    return channel.stream_stream(method)(messages, timeout=LIMIT_S)


def train(raw: Raw) -> None:
    """What a well-behaved client does: everything it asks is answered in time."""
    raw.stub.Describe(npu_pb2.DescribeRequest(), timeout=LIMIT_S)
    health = health_pb2_grpc.HealthStub(raw.channel)
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S).status == 1
    session_id = raw.compile()
    messages = [attach(session_id), begin(1), weight_chunk(1), input_chunk(1, 1)]
    answers = [a.WhichOneof("kind") for a in raw.stub.Forward(iter(messages), timeout=LIMIT_S)]
    assert answers == ["attached", "weights_loaded", "tensor", "done"]
    raw.stub.Release(npu_pb2.ReleaseRequest(session_id=session_id), timeout=LIMIT_S)


@pytest.fixture
def address(tmp_path: Path) -> str:
    """Where the child listens."""
    return f"unix:{tmp_path}/child.sock"


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_are_no_message_are_the_clients_error(start: Start, method: str) -> None:
    """Not INTERNAL, as gRPC would have it."""
    with grpc.insecure_channel(start().address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(call(channel, method, iter([GARBAGE])))
        assert status_parts(caught.value)[:2] == ("INVALID_ARGUMENT", "InvalidInput")


def test_who_has_no_token_is_not_even_listened_to(start: Start, tmp_path: Path) -> None:
    """Neither garbage nor silence is looked at before the token."""
    (tmp_path / "token").write_text("secret")
    server = start(token_file=tmp_path / "token", stall_s=1000)
    raw = Raw(server.address)
    for messages in (iter([GARBAGE]), raw.silence()):
        with pytest.raises(grpc.RpcError) as caught:
            list(call(raw.channel, METHODS[2], messages))
        assert status_parts(caught.value)[:2] == ("UNAUTHENTICATED", "Unauthenticated")


def test_bytes_that_are_no_message_leave_nothing_behind(spawn: Spawn, address: str) -> None:
    """1000 of them; gRPC's own deserializer keeps 16 KB of each, 16 MB."""
    child = spawn()
    with grpc.insecure_channel(address) as channel:

        def send(count: int) -> None:
            for i in range(count):
                with pytest.raises(grpc.RpcError):
                    list(call(channel, METHODS[i % 3], iter([GARBAGE])))

        send(100)
        before = memory_of(child)
        send(1000)
        assert memory_of(child) - before < 4 * 2**20


def test_a_crowd_that_says_nothing_keeps_nobody_out(spawn: Spawn, address: str) -> None:
    """100 calls without a first message, whatever their method, from a client that is still there."""
    spawn("--stall-s", "1000")
    silent = Raw(address)
    methods = (METHODS[0], METHODS[1], METHODS[2], METHODS[7]) * 25
    calls = [call(silent.channel, method, silent.silence()) for method in methods]
    for _ in range(3):
        train(Raw(address))
    silent.ended.set()
    assert len(calls) == 100


def test_a_crowd_of_watchers_keeps_nobody_out(spawn: Spawn, address: str) -> None:
    """100 calls of Watch and reflection that have said what they want; a new watcher hears the health."""
    spawn("--stall-s", "1000")
    silent = Raw(address)
    watch = health_pb2.HealthCheckRequest().SerializeToString()
    calls = [
        call(silent.channel, method, itertools.chain([watch], silent.silence()))
        for method in METHODS[-2:] * 50
    ]
    train(Raw(address))
    watcher = health_pb2_grpc.HealthStub(Raw(address).channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watcher).status == health_pb2.HealthCheckResponse.SERVING
    silent.ended.set()
    assert len(calls) == 100


@pytest.mark.parametrize("method", METHODS)
def test_silence_ends(start: Start, method: str) -> None:
    """A call without a first message is over after the patience, whatever method it is."""
    server = start(stall_s=0.3)
    silent = Raw(server.address)
    with pytest.raises(grpc.RpcError) as caught:
        list(call(silent.channel, method, silent.silence()))
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    silent.ended.set()


def test_a_model_that_stalls_gives_its_place_back(start: Start) -> None:
    """Both places are taken by models that do not come; then they are free again, and no session is left."""
    server = start(stall_s=0.5, max_sessions=2)
    silent = Raw(server.address)
    header = npu_pb2.CompileRequest(header=npu_pb2.CompileHeader(model_bytes=100))
    part = npu_pb2.CompileRequest(model_chunk=b"x")
    calls = [
        call(
            silent.channel,
            f"{NPU}Compile",
            itertools.chain([header.SerializeToString(), part.SerializeToString()], silent.silence()),
        )
        for _ in range(2)
    ]
    for stalled in calls:
        with pytest.raises(grpc.RpcError) as caught:
            list(stalled)
        assert caught.value.code() is grpc.StatusCode.CANCELLED
    for _ in range(2):
        Raw(server.address).compile()
    assert server.sessions.count() == 2
    silent.ended.set()


@pytest.mark.parametrize("part", ["tensor", "update"])
def test_a_stream_that_stalls_in_the_middle_ends(start: Start, part: str) -> None:
    """Half a tensor, or an update without its weights; an idle stream may be silent for ever."""
    server = start(stall_s=0.3)
    raw = Raw(server.address)
    session_id = raw.compile()
    half = input_chunk(1, data=b"x" * 8) if part == "tensor" else begin(1)
    stalled = raw.stub.Forward(itertools.chain([attach(session_id), half], raw.silence()))
    assert next(stalled).WhichOneof("kind") == "attached"
    assert raw.error(stalled)[1] == "SessionLost"
    idle = raw.stub.Forward(itertools.chain([attach(session_id)], raw.silence()))
    assert next(idle).attached.weights_version == 0
    with pytest.raises(grpc.RpcError):
        list(call(raw.channel, f"{NPU}Describe", raw.silence()))  # takes as long as the patience
    assert idle.is_active()
    raw.ended.set()
    assert list(idle) == []


def test_a_byte_now_and_then_is_a_stall_too(start: Start) -> None:
    """Each byte comes long before the patience is over, but a model of 64 MB would take for ever."""
    server = start(stall_s=0.6)
    raw = Raw(server.address)

    def drip() -> Iterator[bytes]:
        yield npu_pb2.CompileRequest(header=npu_pb2.CompileHeader(model_bytes=2**26)).SerializeToString()
        while not raw.ended.wait(0.1):
            yield npu_pb2.CompileRequest(model_chunk=b"x").SerializeToString()

    dripping = call(raw.channel, f"{NPU}Compile", drip())
    with pytest.raises(grpc.RpcError) as caught:
        list(dripping)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    raw.ended.set()


def test_streams_that_wait_for_the_device_are_counted(start: Start, backend: FakeBackend) -> None:
    """All of a session's: each replaces the one before, eight wait for the device, the next one may not."""
    server = start()
    busy, raw = Raw(server.address), Raw(server.address)
    session_id = raw.compile()
    backend.gate.clear()
    at_work = busy.stub.Forward(iter([attach(busy.compile()), input_chunk()]))
    assert backend.layer_began.acquire(timeout=LIMIT_S)
    latest = raw.stub.Forward(itertools.chain([attach(session_id)], raw.silence()))
    wait_until(lambda: server.status().sessions[0].attached)
    for _ in range(7):
        replaced = latest
        latest = raw.stub.Forward(itertools.chain([attach(session_id)], raw.silence()))
        assert raw.error(replaced)[1] == "SessionLost"
    wait_until(lambda: server.status().queue_depth >= 8)
    one_more = raw.stub.Forward(itertools.chain([attach(session_id)], raw.silence()))
    assert raw.error(one_more)[:2] == ("RESOURCE_EXHAUSTED", "QuotaExceeded")
    assert server.status().queue_depth <= 9  # the ninth asks for the device's health
    backend.gate.set()
    assert [answer.WhichOneof("kind") for answer in at_work] == ["attached", "tensor", "done"]
    assert [a.WhichOneof("kind") for a in raw.stub.Forward(iter([attach(session_id)]))] == ["attached"]


def test_a_name_cannot_forge_a_line_of_the_log(
    spawn: Spawn, address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a client calls a weight stands in the log on one line, short."""
    child = spawn()
    raw = Raw(address)
    name = "x\n2026-01-01 00:00:00,000 ERROR forged: " + "y" * 900
    raw.error(raw.stub.Forward(iter([attach(raw.compile()), begin(1, name)])))
    child.terminate()
    child.wait(LIMIT_S)
    written = capfd.readouterr().err
    assert r"weight 'x\x0a2026-01-01" in written
    assert "\n2026-01-01" not in written


def test_a_health_list_names_every_service(start: Start) -> None:
    """The server as a whole and each of its services."""
    with grpc.insecure_channel(start().address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
        assert {"", "npu_wire.v1.NpuService", "grpc.health.v1.Health"} <= set(answer.statuses)
        assert {status.status for status in answer.statuses.values()} == {1}


def test_a_cancelled_call_is_not_counted_as_a_good_one(start: Start, backend: FakeBackend) -> None:
    """A stream that its client cancels, and one that it ends."""
    server = start()
    raw = Raw(server.address)

    def counted(code: str) -> float:
        labels = {"method": "Forward", "code": code}
        return server.telemetry.registry.get_sample_value("npu_requests_total", labels) or 0.0

    # gRPC may say that a cancelled call's messages end before it says why: a batch at work keeps the stream.
    backend.gate.clear()
    call_ = raw.stub.Forward(itertools.chain([attach(raw.compile()), input_chunk()], raw.silence()))
    next(call_)
    assert backend.layer_began.acquire(timeout=60)
    call_.cancel()
    wait_until(lambda: counted("CANCELLED") + counted("OK") == 1)
    assert (counted("CANCELLED"), counted("OK")) == (1, 0)
    backend.gate.set()
    list(raw.stub.Forward(iter([attach(raw.compile())])))
    wait_until(lambda: counted("OK") == 1)
    assert counted("CANCELLED") == 1
    raw.ended.set()
