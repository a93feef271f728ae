"""A layer runs as soon as its own weights are there, with those of the batch's version and no others."""

import queue
from collections.abc import Iterator
from random import Random

import grpc
import numpy as np
import pytest
from fake_backend import Start
from raw_client import Raw, attach, begin, weight
from test_refused_update import BETTER, GOOD, OPTIONS, RANGES, batch, model

from npu_server.registry import create_backend
from npu_server.seam import Program
from npu_wire.channel import status_parts
from npu_wire.layer_map import Float32Array
from npu_wire.tensors import TensorAssembler
from npu_wire.v1 import npu_pb2

IMAGES = np.random.default_rng(5).integers(-128, 128, (3, 3, 2, 2), dtype=np.int8)
FIRST, SECOND = ("weight", "gamma", "beta"), ("second",)
Tensors = dict[str, Float32Array]


class Conversation:
    """A stream whose client sends when it has read what it wants."""

    def __init__(self, raw: Raw, session_id: str) -> None:
        self._requests: queue.SimpleQueue[npu_pb2.ForwardRequest | None] = queue.SimpleQueue()
        self.answers: Iterator[npu_pb2.ForwardResponse] = raw.stub.Forward(iter(self._requests.get, None))
        self.say(attach(session_id))
        self.attached = next(self.answers).attached.weights_version

    def say(self, *requests: npu_pb2.ForwardRequest | None) -> None:
        """Sends; None is the end."""
        for request in requests:
            self._requests.put(request)

    def tensor(self, version: int, layer: int) -> bytes:
        """The next answer, which is that layer's output, computed with that version."""
        answer = next(self.answers)
        assert (answer.WhichOneof("kind"), answer.weights_version) == ("tensor", version)
        assert answer.tensor.layer == layer
        return TensorAssembler(answer.tensor.chunk, 1000).add(answer.tensor.chunk).tobytes()  # type: ignore[union-attr]

    def kinds(self) -> list[str | None]:
        """What comes until the end."""
        return [answer.WhichOneof("kind") for answer in self.answers]


def update_of(seed: int) -> Tensors:
    """Other weights for both layers."""
    rng = np.random.default_rng(seed)
    names = (*FIRST, *SECOND)
    return {n: (GOOD[n] * rng.uniform(0.5, 1.5, GOOD[n].shape) + 0.01).astype(np.float32) for n in names}


def judge(*updates: Tensors) -> list[bytes]:
    """Every layer's bytes of a program that got these updates whole."""
    program: Program = create_backend("reference", OPTIONS).compile(model(), RANGES)
    for update in updates:
        program.load_weights(update)
    tensors = program.forward(program.layer_map.named(IMAGES), (0, 1))
    return [tensor.data.tobytes() for tensor in tensors if tensor]


@pytest.fixture(params=["reference", "emulator"])
def raw(start: Start, request: pytest.FixtureRequest) -> Iterator[Raw]:
    """A client that speaks the protocol by hand, to a real backend."""
    client = Raw(start(create_backend(request.param, OPTIONS), max_in_flight=100).address)
    yield client
    client.close()


def test_the_first_layer_is_answered_before_the_second_ones_weights_are_sent(raw: Raw) -> None:
    """The client has layer 0's output in its hands when it sends the last tensor."""
    new = update_of(1)
    expected = judge(new)
    stream = Conversation(raw, raw.compile(model(), RANGES))
    stream.say(begin(1, *new), *(weight(1, name, new[name]) for name in FIRST), batch(1, IMAGES))
    assert stream.tensor(1, 0) == expected[0]
    stream.say(weight(1, "second", new["second"]), None)
    loaded = next(stream.answers)
    assert (loaded.WhichOneof("kind"), loaded.weights_version) == ("weights_loaded", 1)
    assert stream.tensor(1, 1) == expected[1]
    assert stream.kinds() == ["done"]


def test_a_batch_waits_for_the_weights_of_its_first_layer(raw: Raw) -> None:
    """Those of the second come first; until the others are there, nothing of the old ones is answered."""
    new = update_of(2)
    expected = judge(new)
    stream = Conversation(raw, raw.compile(model(), RANGES))
    stream.say(begin(1, *new), weight(1, "second", new["second"]), batch(1, IMAGES))
    stream.say(*(weight(1, name, new[name]) for name in FIRST), None)
    assert next(stream.answers).WhichOneof("kind") == "weights_loaded"
    assert [stream.tensor(1, layer) for layer in (0, 1)] == expected
    assert stream.kinds() == ["done"]


LATE = {
    "NaN": (np.full((4, 4, 1, 1), np.nan, np.float32), "NonFiniteInput"),
    "no multiplier": (np.full((4, 4, 1, 1), 1e38, np.float32), "InvalidInput"),
    "another shape": (np.ones((2, 2), np.float32), "InvalidInput"),
}


@pytest.mark.parametrize("case", LATE)
def test_a_batch_that_had_begun_gets_the_refusal_of_its_update(raw: Raw, case: str) -> None:
    """Its first layer was answered; then the stream ends, the old weights stay, the next update is whole."""
    session_id = raw.compile(model(), RANGES)
    new, (bad, error) = update_of(3), LATE[case]
    stream = Conversation(raw, session_id)
    stream.say(begin(1, *new), *(weight(1, name, new[name]) for name in FIRST), batch(1, IMAGES))
    assert stream.tensor(1, 0) == judge(new)[0]
    stream.say(weight(1, "second", bad))
    with pytest.raises(grpc.RpcError) as caught:
        stream.kinds()
    assert status_parts(caught.value)[1] == error

    again = Conversation(raw, session_id)
    assert again.attached == 0
    again.say(batch(0, IMAGES))
    assert [again.tensor(0, layer) for layer in (0, 1)] == judge()
    assert next(again.answers).WhichOneof("kind") == "done"
    request = batch(2, IMAGES)
    request.batch.batch_id = 2
    again.say(begin(2, *BETTER), *(weight(2, name, array) for name, array in BETTER.items()), request, None)
    kinds = []
    for answer in again.answers:
        kinds.append(answer.WhichOneof("kind"))
        if answer.HasField("tensor"):
            chunk = answer.tensor.chunk
            assert TensorAssembler(chunk, 1000).add(chunk).tobytes() == judge(BETTER)[answer.tensor.layer]  # type: ignore[union-attr]
    assert sorted(kinds) == ["done", "tensor", "tensor", "weights_loaded"]


def test_a_client_that_leaves_half_way_has_changed_nothing(raw: Raw) -> None:
    """A broken connection after the first layer's answer, then a new stream."""
    session_id = raw.compile(model(), RANGES)
    new = update_of(4)
    stream = Conversation(raw, session_id)
    stream.say(begin(1, *new), *(weight(1, name, new[name]) for name in FIRST), batch(1, IMAGES))
    stream.tensor(1, 0)
    stream.answers.cancel()  # type: ignore[attr-defined]
    again = Conversation(raw, session_id)
    assert again.attached == 0
    again.say(batch(0, IMAGES), None)
    assert [again.tensor(0, layer) for layer in (0, 1)] == judge()
    stream.say(None)


def test_every_batch_is_computed_with_its_versions_weights(raw: Raw) -> None:
    """40 updates of some tensors in any order, batches anywhere, each judged by a program with whole ones."""
    random, weights = Random(6), [dict[str, Float32Array]()]
    requests: list[npu_pb2.ForwardRequest | None] = []
    due: dict[int, list[bytes]] = {}
    for version in range(1, 41):
        every = update_of(100 + version)
        update = {name: every[name] for name in random.sample([*every], random.randint(1, len(every)))}
        weights.append(weights[-1] | update)
        messages = [weight(version, name, array) for name, array in update.items()]
        # Before, between or behind the tensors of its update.
        for at, batch_id in (
            (random.randint(0, len(messages)), 2 * version),
            (len(messages) + 1, 2 * version + 1),
        ):
            request = batch(version, IMAGES)
            request.batch.batch_id = batch_id
            messages.insert(at, request)
            due[batch_id] = judge(weights[-1])
        requests += [begin(version, *update), *messages]
    stream = Conversation(raw, raw.compile(model(), RANGES))
    finished = []
    for request in requests:
        stream.say(request)
    stream.say(None)
    came: dict[int, list[bytes]] = {batch_id: [] for batch_id in due}
    for answer in stream.answers:
        if answer.HasField("tensor"):
            chunk = answer.tensor.chunk
            assert answer.weights_version == answer.batch_id // 2
            came[answer.batch_id].append(TensorAssembler(chunk, 1000).add(chunk).tobytes())  # type: ignore[union-attr]
        elif answer.HasField("done"):
            finished.append(answer.batch_id)
    assert finished == sorted(due)
    assert came == due
