"""Bad input, quotas and leases: every refusal is the right class on the client, and the server goes on."""

import itertools
import logging
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from fake_backend import MAX_BATCH, FakeBackend, Start, expected
from raw_client import Raw, announced, attach, begin, input_chunk, weight_chunk

from npu_wire.channel import status_parts
from npu_wire.errors import (
    DeviceFault,
    InvalidInput,
    InvalidModel,
    NonFiniteInput,
    NpuError,
    QuotaExceeded,
    SessionLost,
    UnsupportedModel,
)
from npu_wire.layer_map import Int8Array
from npu_wire.v1 import npu_pb2, program_pb2, tensor_pb2
from trainer_client.npu.connection import Connection, connect

RANGES = {"t0": (-1.0, 1.0)}


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (b"unreadable", InvalidModel, "no model"),
        (b"unsupported", UnsupportedModel, r"node 'n' \(Frobnicate\)"),
        (b"crash", DeviceFault, "its log says why"),
        (b"", InvalidModel, "0 bytes"),
    ],
)
def test_a_refused_model_is_the_backends_own_error(
    npu: Connection, model: bytes, error: type[NpuError], message: str
) -> None:
    """Class and message survive the wire, and the next model compiles."""
    with pytest.raises(error, match=message) as caught:
        npu.compile(model, RANGES)
    assert type(caught.value) is error
    assert "secret" not in str(caught.value)
    npu.compile(b"model", RANGES)


@pytest.mark.parametrize("bounds", [(0.0, 0.0), (1.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_an_illegal_range_is_refused_by_name(npu: Connection, bounds: tuple[float, float]) -> None:
    """Zero width, the wrong way round, NaN and infinity."""
    with pytest.raises(InvalidInput, match="'conv1'"):
        npu.compile(b"model", {"conv1": bounds})


def test_a_large_model_travels_in_chunks_up_to_the_quota(start: Start, backend: FakeBackend) -> None:
    """5 MB pass where 5 MB are allowed, one byte more does not."""
    size = 5 * 2**20
    with connect(start(max_model_bytes=size).address) as npu:
        npu.compile(b"m" * size, RANGES)
        with pytest.raises(QuotaExceeded, match="--max-model-bytes"):
            npu.compile(b"m" * (size + 1), RANGES)


def test_sessions_are_counted(start: Start) -> None:
    """The third of two is refused, until one is closed; a refused model takes no place."""
    with connect(start(max_sessions=2).address) as npu:
        first = npu.compile(b"model", RANGES)
        with pytest.raises(InvalidModel):
            npu.compile(b"unreadable", RANGES)
        second = npu.compile(b"model", RANGES)
        with pytest.raises(QuotaExceeded, match="--max-sessions"):
            npu.compile(b"model", RANGES)
        first.close()
        npu.compile(b"model", RANGES)
        second.close()


def test_the_client_keeps_to_the_window(start: Start, backend: FakeBackend, batch: Int8Array) -> None:
    """With one batch in flight allowed, ten submitted at once are all answered."""
    with connect(start(max_in_flight=1).address) as npu:
        session = npu.compile(b"model", RANGES)
        pending = [session.submit({"t0": batch}, ()) for _ in range(10)]
        for answer in pending:
            np.testing.assert_array_equal(expected(batch, 2), answer.tensor(2))


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 2, 4, 5), np.int8),
        np.zeros((2, 4, 4), np.int8),
        np.zeros((1, 2, 4, 4), np.uint8),
        np.zeros((0, 2, 4, 4), np.int8),
        np.zeros((MAX_BATCH + 1, 2, 4, 4), np.int8),
    ],
)
def test_the_client_refuses_a_wrong_batch_at_once(
    npu: Connection, wrong: Int8Array, batch: Int8Array
) -> None:
    """Shape, rank, dtype, no samples and too many; the session goes on."""
    session = npu.compile(b"model", RANGES)
    with pytest.raises(InvalidInput):
        session.submit({"t0": wrong}, ())
    np.testing.assert_array_equal(expected(batch, 2), session.submit({"t0": batch}, ()).tensor(2))


def test_the_client_refuses_weights_that_are_not_real_numbers(npu: Connection) -> None:
    """NaN, infinity and float64."""
    session = npu.compile(b"model", RANGES)
    for value in (np.nan, np.inf):
        with pytest.raises(NonFiniteInput, match="'bias'"):
            session.push_weights({"bias": np.array(value, np.float32)})
    with pytest.raises(InvalidInput, match="float64"):
        session.push_weights({"bias": np.zeros(1)})  # type: ignore[dict-item]


@pytest.fixture
def raw(start: Start) -> Iterator[Raw]:
    """A client that breaks rules, with tight quotas."""
    client = Raw(start(max_in_flight=2, max_model_bytes=1000, max_session_bytes=1000).address)
    yield client
    client.ended.set()
    client.channel.close()


BAD_STREAMS = {
    "unknown tap": ([input_chunk(taps=[3])], "InvalidInput", "taps layer 3"),
    "stale version": ([input_chunk(version=4)], "InvalidInput", "current one is 0"),
    "batch id 0": ([input_chunk(0)], "InvalidInput", "not larger than 0"),
    "batch id again": ([input_chunk(1), input_chunk(1)], "InvalidInput", "not larger than 1"),
    "name": ([input_chunk(name="t9")], "InvalidInput", "expected 't0'"),
    "no name": ([input_chunk(name="")], "InvalidInput", "0 characters"),
    "type": ([input_chunk(dtype=tensor_pb2.DATA_TYPE_FLOAT32)], "InvalidInput", "float32"),
    "no type": ([input_chunk(dtype=0)], "InvalidInput", "unknown data type 0"),
    "layout": ([input_chunk(layout=2)], "InvalidInput", "channels_last"),
    "no layout": ([input_chunk(layout=0)], "InvalidInput", "unknown memory layout"),
    "shape": ([input_chunk(shape=[1, 2, 4, 5])], "InvalidInput", r"(1, 2, 4, 5)"),
    "huge shape": ([input_chunk(shape=[2**40, 2**40, 4, 4])], "InvalidInput", "samples"),
    "no samples": ([input_chunk(shape=[0, 2, 4, 4])], "InvalidInput", "0 samples"),
    "gap": ([input_chunk(offset=7)], "InvalidInput", "chunk at byte 7; 0 must follow"),
    "overlap": ([input_chunk(data=b"x" * 8), input_chunk(offset=4)], "InvalidInput", "8 must follow"),
    "too many bytes": ([input_chunk(data=b"x" * 33)], "InvalidInput", "33 bytes"),
    "no bytes": ([input_chunk(data=b"")], "InvalidInput", "0 bytes"),
    "interleaved": ([input_chunk(data=b"x" * 8), weight_chunk(1)], "InvalidInput", "in the middle"),
    "attach twice": ([attach("x")], "InvalidInput", "got 'attach'"),
    "nothing": ([npu_pb2.ForwardRequest()], "InvalidInput", "got 'None'"),
    "NaN weight": ([begin(1), weight_chunk(1, np.nan)], "NonFiniteInput", "'bias' of version 1"),
    "weights version 0": ([begin(0)], "InvalidInput", "not larger than 0"),
    "mixed versions": ([begin(1), weight_chunk(2)], "InvalidInput", "those of version 1 are awaited"),
    "two updates at once": ([begin(1), begin(2)], "InvalidInput", "version 1 lacks 1"),
    "weight twice": ([begin(1), weight_chunk(1), weight_chunk(1)], "InvalidInput", "is not awaited"),
    "named twice": ([begin(1, "bias", "bias")], "InvalidInput", "twice"),
    "empty update": (
        [npu_pb2.ForwardRequest(update=npu_pb2.WeightUpdate(weights_version=1))],
        "InvalidInput",
        "names no initializer",
    ),
    "weight of no update": ([weight_chunk(1)], "InvalidInput", "those of version 0 are awaited"),
    "unknown weight": ([begin(1, "nonesuch")], "InvalidInput", "no layer of this program"),
    "another weight": ([begin(1), announced("big", (3, 1000, 1000))], "InvalidInput", "is not awaited"),
    "shape of a weight": (
        [begin(1), announced("bias", (2,))],
        "InvalidInput",
        "expected 'bias' (float32, shape ()",
    ),
    "large weight": ([begin(1, "big")], "QuotaExceeded", "--max-session-bytes"),
    "two early batches": ([begin(1), input_chunk(1, 1), input_chunk(2, 1)], "InvalidInput", "the second one"),
    "an early batch of the old version": (
        [begin(1), input_chunk(1, 0)],
        "InvalidInput",
        "names weights version 0",
    ),
    "end in the middle of an update": (
        [begin(1, "bias"), input_chunk(1, 1)],
        "InvalidInput",
        "before all tensors of weights version 1",
    ),
    "large batch": ([input_chunk(shape=[32, 2, 4, 4])], "QuotaExceeded", "batch 1 has 1024 bytes"),
    "type of a weight": (
        [begin(1), announced("bias", (), tensor_pb2.DATA_TYPE_INT8)],
        "InvalidInput",
        "int8",
    ),
    "version goes back": ([begin(5), weight_chunk(5), begin(4)], "InvalidInput", "not larger than 5"),
}


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_a_stream_that_breaks_a_rule_ends_with_the_reason(raw: Raw, case: str) -> None:
    """Every rule of the wire, broken by hand; the session can be attached again afterwards."""
    messages, error, reason = BAD_STREAMS[case]
    session_id = raw.compile()
    _, class_name, details = raw.error(raw.stub.Forward(iter([attach(session_id), *messages])))
    assert class_name == error
    assert reason in details
    answers = list(raw.stub.Forward(iter([attach(session_id)])))
    assert [answer.WhichOneof("kind") for answer in answers] == ["attached"]


def test_every_answer_names_profile_version_and_batch(raw: Raw) -> None:
    """What the proto promises of each message of a stream."""
    messages = [attach(raw.compile()), begin(7), weight_chunk(7), input_chunk(3, 7)]
    answers = list(raw.stub.Forward(iter(messages)))
    assert [(a.WhichOneof("kind"), a.weights_version, a.batch_id) for a in answers] == [
        ("attached", 0, 0),
        ("weights_loaded", 7, 0),
        ("tensor", 7, 3),
        ("done", 7, 3),
    ]
    assert {a.profile_hash for a in answers} == {"0" * 64}


def test_answers_before_a_bad_message_still_come(raw: Raw) -> None:
    """An error ends the stream in its turn, not before."""
    call = raw.stub.Forward(iter([attach(raw.compile()), input_chunk(1), input_chunk(1)]))
    kinds = [next(call).WhichOneof("kind") for _ in range(3)]
    assert kinds == ["attached", "tensor", "done"]
    assert raw.error(call)[1] == "InvalidInput"


def test_too_many_batches_in_flight_are_refused(start: Start, backend: FakeBackend) -> None:
    """The third of two ends the stream, after the device has answered those before."""
    backend.gate.clear()
    server = start(max_in_flight=2)
    raw = Raw(server.address)
    call = raw.stub.Forward(iter([attach(raw.compile()), *(input_chunk(i) for i in range(1, 4))]))
    next(call)
    backend.layer_began.acquire()
    while server.status().queue_depth < 2:  # the second batch, and the end of the stream
        time.sleep(0.01)
    backend.gate.set()
    assert raw.error(call)[:2] == ("RESOURCE_EXHAUSTED", "QuotaExceeded")


def test_a_new_stream_replaces_the_old_one(raw: Raw) -> None:
    """The old stream is told so; weights that it loaded stay."""
    session_id = raw.compile()
    first = raw.stub.Forward(itertools.chain([attach(session_id), begin(2), weight_chunk(2)], raw.silence()))
    assert [next(first).WhichOneof("kind") for _ in range(2)] == ["attached", "weights_loaded"]
    second = raw.stub.Forward(iter([attach(session_id)]))
    assert next(second).attached.weights_version == 2
    assert raw.error(first)[1] == "SessionLost"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "must be the header"),
        ([npu_pb2.CompileRequest(model_chunk=b"x")], "must be the header"),
        ([npu_pb2.CompileRequest(header=npu_pb2.CompileHeader(model_bytes=2))], "but 0 came"),
        (
            [
                npu_pb2.CompileRequest(header=npu_pb2.CompileHeader(model_bytes=2)),
                npu_pb2.CompileRequest(model_chunk=b"xyz"),
            ],
            "announces 2 bytes",
        ),
        (
            [
                npu_pb2.CompileRequest(
                    header=npu_pb2.CompileHeader(
                        model_bytes=2, ranges=[program_pb2.ActivationRange(name="a", min=0, max=1)] * 2
                    )
                )
            ],
            "comes twice",
        ),
    ],
)
def test_a_compile_call_that_breaks_a_rule(
    raw: Raw, messages: list[npu_pb2.CompileRequest], reason: str
) -> None:
    """Header first, once, and as many bytes as it says."""
    with pytest.raises(grpc.RpcError) as caught:
        raw.stub.Compile(iter(messages))
    code, class_name, details = status_parts(caught.value)
    assert (code, class_name) == ("INVALID_ARGUMENT", "InvalidInput")
    assert reason in details


def test_unknown_sessions(raw: Raw) -> None:
    """KeepAlive and Forward say SessionLost, Release does not care."""
    raw.stub.Release(npu_pb2.ReleaseRequest(session_id="nonesuch"))
    with pytest.raises(grpc.RpcError) as caught:
        raw.stub.KeepAlive(npu_pb2.KeepAliveRequest(session_id="nonesuch"))
    assert status_parts(caught.value)[1] == SessionLost.__name__
    assert raw.error(raw.stub.Forward(iter([attach("nonesuch")])))[1] == SessionLost.__name__


def test_a_long_name_costs_neither_status_nor_class(raw: Raw) -> None:
    """1000 characters of four bytes, which gRPC writes as twelve each: more than its 8 KB of metadata."""
    code, name, details = raw.error(
        raw.stub.Forward(iter([attach(raw.compile()), begin(1, "\U0001f642" * 1000)]))
    )
    assert (code, name) == ("INVALID_ARGUMENT", "InvalidInput")
    assert details.startswith("weight '\U0001f642\U0001f642")


def test_nobody_learns_a_sessions_whole_name(raw: Raw, caplog: pytest.LogCaptureFixture) -> None:
    """Neither from errors nor from the log: who knows it may use the session."""
    caplog.set_level(logging.DEBUG)
    session_id = raw.compile()
    first = raw.stub.Forward(itertools.chain([attach(session_id)], raw.silence()))
    next(first)
    second = raw.stub.Forward(itertools.chain([attach(session_id)], raw.silence()))
    next(second)
    texts = [raw.error(first)[2]]
    raw.stub.Release(npu_pb2.ReleaseRequest(session_id=session_id))
    texts += [raw.error(second)[2], raw.error(raw.stub.Forward(iter([attach(session_id)])))[2], caplog.text]
    for text in texts:
        assert session_id[:8] in text
        assert session_id not in text


def test_a_cancelled_client_frees_the_device_at_the_next_layer(start: Start, backend: FakeBackend) -> None:
    """Of three tapped layers the device begins no further one; then it serves others."""
    server = start()
    raw = Raw(server.address)
    backend.gate.clear()
    call = raw.stub.Forward(iter([attach(raw.compile()), input_chunk(taps=[0, 1, 2])]))
    next(call)
    backend.layer_began.acquire()
    call.cancel()
    while server.status().sessions[0].attached:
        time.sleep(0.01)
    backend.gate.set()
    answers = list(raw.stub.Forward(iter([attach(raw.compile()), input_chunk()])))
    assert answers[-1].WhichOneof("kind") == "done"
    assert backend.calls.count("layer 0") == 2
    assert backend.calls.count("layer 1") == 1
