"""Attacks that are messages: undecodable, out of order, of wrong sizes, with names that nobody has."""

import random

from npu_wire.v1 import npu_pb2, tensor_pb2

from .foe import HEALTH, METHODS, NPU, Foe
from .mutate import mutate_bytes, mutate_field, mutate_sequence
from .recordings import attach, compile_requests, weight_requests

_HUGE = (2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**64 - 1)


def undecodable(foe: Foe) -> str:
    """Random bytes to any method, in as many messages as it does not expect."""
    messages = [foe.rng.randbytes(foe.rng.choice((0, 1, 7, 100, 5000))) for _ in range(foe.rng.randint(0, 4))]
    return foe.converse(foe.rng.choice(METHODS), messages, patience_s=foe.rng.uniform(0.2, 3.0)).status


def mutated_compile(foe: Foe) -> str:
    """A legal Compile call whose bytes, fields or order were changed."""
    messages = list(foe.small.compile)
    if foe.rng.random() < 0.5:
        messages = mutate_sequence(foe.rng, messages, foe.small.forward)
    else:
        messages[0] = _with_wrong_field(foe.rng, npu_pb2.CompileRequest, messages[0])
    outcome = foe.converse(NPU + "Compile", messages, hold_s=foe.rng.choice((0.0, 0.0, 2.0)))
    if outcome.answers:
        foe.leave(npu_pb2.CompileResponse.FromString(outcome.answers[0]).session_id)
    return outcome.status


def mutated_forward(foe: Foe) -> str:
    """A legal Forward stream whose bytes or order were changed."""
    session_id = foe.open(foe.small)
    messages = [attach(session_id), *foe.small.forward]
    if foe.rng.random() < 0.8:
        messages[1:] = mutate_sequence(foe.rng, messages[1:], [*foe.small.compile, messages[0]])
    else:
        messages = mutate_sequence(foe.rng, messages, foe.small.compile)
    status = foe.converse(NPU + "Forward", messages, patience_s=foe.rng.uniform(0.5, 5.0)).status
    foe.leave(session_id)
    return status


def mutated_fields(foe: Foe) -> str:
    """A legal Forward stream in which one field says something extreme."""
    session_id = foe.open(foe.small)
    messages = list(foe.small.forward)
    at = foe.rng.randrange(len(messages))
    messages[at] = _with_wrong_field(foe.rng, npu_pb2.ForwardRequest, messages[at])
    outcome = foe.converse(NPU + "Forward", [attach(session_id), *messages])
    foe.leave(session_id)
    return outcome.status


def sizes(foe: Foe) -> str:
    """Sizes that were announced and are not sent, or are more than anybody could hold."""
    rng = foe.rng
    if rng.random() < 0.4:
        announced = rng.choice((0, 1, len(foe.small.model) - 1, len(foe.small.model) + 1, *_HUGE))
        header = npu_pb2.CompileRequest(header=npu_pb2.CompileHeader(model_bytes=announced))
        messages = [header.SerializeToString(), *foe.small.compile[1:]]
        return foe.converse(NPU + "Compile", messages, hold_s=rng.choice((0.0, 3.0)), patience_s=5.0).status
    session_id = foe.open(foe.small)
    messages = [attach(session_id)]
    request = npu_pb2.ForwardRequest()
    if rng.random() < 0.5:
        version = rng.choice((0, 1))
        messages.append(
            _announcement(version, rng.choice((("w1",), ("w1", "b1"), ("nobody",), ("w1", "w1"), ())))
        )
        request.weight.weights_version, chunk = 1, request.weight.chunk
        chunk.name, chunk.dtype = rng.choice(("w1", "b1", "nobody")), tensor_pb2.DATA_TYPE_FLOAT32
        chunk.shape.extend(rng.choice(((), (4,), (0,), (2**20, 2**9), (4, 3, 3, 3), (2**63, 2), (2**40,))))
    else:
        request.batch.batch_id, chunk = 1, request.batch.chunk
        chunk.name, chunk.dtype = "x", tensor_pb2.DATA_TYPE_INT8
        chunk.shape.extend((rng.choice((0, 1, 3, 4096, *_HUGE)), 3, 8, 8))
    chunk.layout = tensor_pb2.MEMORY_LAYOUT_CONTIGUOUS
    chunk.offset = rng.choice((0, 0, 0, 1, 2**64 - 1))
    chunk.data = rng.randbytes(rng.choice((0, 1, 4, 192, 576, 10_000)))
    messages.append(request.SerializeToString())
    status = foe.converse(NPU + "Forward", messages, hold_s=rng.choice((0.0, 2.0)), patience_s=4.0).status
    foe.leave(session_id)
    return status


def _announcement(version: int, names: tuple[str, ...]) -> bytes:
    update = npu_pb2.WeightUpdate(weights_version=version, names=names)
    return npu_pb2.ForwardRequest(update=update).SerializeToString()


def unknown_names(foe: Foe) -> str:
    """Sessions, methods and tensors of nobody."""
    rng = foe.rng
    name = rng.choice(("", "nobody", rng.randbytes(16).hex(), "x" * 100_000, "\n\x1b[2J", "名" * 500, "\0"))
    match rng.randrange(4):
        case 0:
            return foe.converse(NPU + "Forward", [attach(name)]).status
        case 1:
            method = rng.choice(("KeepAlive", "Release"))
            return foe.converse(
                NPU + method, [npu_pb2.KeepAliveRequest(session_id=name).SerializeToString()]
            ).status
        case 2:
            path = rng.choice(
                (NPU + "Nothing", "/nobody.Service/Call", HEALTH + "Walk", "/", "/" + "y" * 999)
            )
            return foe.converse(path, [name.encode()]).status
        case _:
            # a health service of that name: field 1 of HealthCheckRequest
            raw = name.encode()[:100]
            request = b"\x0a" + bytes([len(raw)]) + raw
            return foe.converse(HEALTH + rng.choice(("Check", "Watch")), [request], patience_s=2.0).status


def unfinished_updates(foe: Foe) -> str:
    """Updates that lack weights, weights of no update, versions that go back, until a quota or patience."""
    rng = foe.rng
    session_id = foe.open(foe.small)
    weights = {name: foe.small.weights[name] for name in ("w1", "b1")}
    messages: list[bytes] = []
    for _ in range(rng.randint(1, 30)):
        update = weight_requests(rng.choice((1, 1, 2, 3, 2**64 - 1)), weights)
        begin = rng.choice((0, 0, 0, 1))
        messages += update if rng.random() < 0.4 else update[begin : rng.randrange(len(update))]
        if rng.random() < 0.2:
            messages.append(foe.small.forward[-1])
    status = foe.converse(NPU + "Forward", [attach(session_id), *messages], patience_s=5.0).status
    foe.leave(session_id)
    return status


def too_many_batches(foe: Foe) -> str:
    """More batches than may be in flight, or one with thousands of taps."""
    session_id = foe.open(foe.small)
    batch = [message for message in foe.small.forward if b"x" in message[-4000:]][-1]
    messages = []
    for batch_id in range(1, foe.rng.randint(4, 60)):
        request = npu_pb2.ForwardRequest.FromString(batch)
        request.batch.batch_id, request.batch.weights_version = batch_id, 0
        if foe.rng.random() < 0.1:
            request.batch.taps.extend([0] * 10_000)
        messages.append(request.SerializeToString())
    status = foe.converse(NPU + "Forward", [attach(session_id), *messages], pause_s=0.01).status
    foe.leave(session_id)
    return status


def hostile_model(foe: Foe) -> str:
    """A model that nobody means well with."""
    _, model = foe.rng.choice(foe.models)
    ranges = foe.small.ranges if foe.rng.random() < 0.8 else {"x": (0.0, float("nan"))}
    patience_s = foe.rng.choice((0.1, 1.0, 20.0))
    outcome = foe.converse(NPU + "Compile", compile_requests(model, ranges), patience_s=patience_s)
    if outcome.answers:
        foe.leave(npu_pb2.CompileResponse.FromString(outcome.answers[0]).session_id)
    return outcome.status


def odd_metadata(foe: Foe) -> str:
    """Tokens, deadlines, encodings and headers that mean nothing."""
    rng = foe.rng
    metadata = rng.choice(
        (
            [("authorization", "Bearer " + "t" * rng.choice((0, 10, 3000)))],
            [("authorization", "Basic eDp5"), ("authorization", "Bearer x")],
            [("npu-error", "SessionLost")],
            [("x-binary-bin", rng.randbytes(1000))],
            [(f"key-{i}", "v" * 50) for i in range(100)],
            [("grpc-accept-encoding", "gzip,deflate"), ("grpc-encoding-x", "br")],
        )
    )
    return foe.converse(rng.choice(METHODS[:8]), [b""], metadata=metadata, patience_s=2.0).status


def _with_wrong_field(rng: random.Random, kind: type, raw: bytes) -> bytes:
    message = kind.FromString(raw)
    mutate_field(rng, message)
    serialized: bytes = message.SerializeToString()
    return serialized if rng.random() < 0.8 else mutate_bytes(rng, serialized)
