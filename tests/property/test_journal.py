"""Whatever a server does, a batch is answered with the weights it was submitted with, or it fails."""

import threading
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_wire.errors import DeviceFault, InvalidInput, NpuError
from npu_wire.layer_map import Int8Array, LayerMap, LayerSpec, TensorSpec
from trainer_client.npu.journal import Journal, Operation, SentBatch, WeightUpdate

LAYER = LayerSpec(TensorSpec("y", (1,), 1.0, 0), "Add", ("x",))
LAYER_MAP = LayerMap((TensorSpec("x", (1,), 1.0, 0),), (LAYER,), ("y",))
DATA = np.zeros((1, 1), np.int8)
POISON = 99.0

Weights = dict[str, float]


class Nobody:
    """Never asked: the test looks at the batches itself."""

    def wait_for(self, batch: SentBatch, layer: int) -> Int8Array:
        raise AssertionError


class Simulation:
    """A user, a journal and a server in one thread."""

    def __init__(self) -> None:
        self.journal = Journal(threading.Condition())
        self.journal.changed.acquire()
        self.on_the_npu: Weights = {}
        self.inbox: list[Operation] = []
        self.believed: Weights = {}
        self.seen: set[str] = set()
        self.version = 0
        self.batches: list[tuple[SentBatch, Weights]] = []
        self.answers: dict[SentBatch, Weights] = {}

    def push(self, name: str, value: float) -> None:
        """The user adds to what he believes to be on the NPU."""
        update = WeightUpdate(self.version + 1, {name: np.array(value, np.float32)})
        try:
            self.journal.append(update)
        except NpuError as error:
            self.see(error)
            return
        self.version += 1
        self.believed |= {name: value}

    def submit(self) -> None:
        """The user expects an answer of the weights that he believes in."""
        batch = SentBatch(len(self.batches) + 1, self.version, {"x": DATA}, 1, (), LAYER_MAP, Nobody())
        self.batches.append((batch, dict(self.believed)))
        self.journal.append(batch)

    def look(self) -> None:
        """The user asks for every batch."""
        for batch, _ in self.batches:
            try:
                self.journal.raise_error_of(batch)
            except NpuError as error:
                self.see(error)

    def see(self, error: NpuError) -> None:
        """The first sight of an update's error tells that the NPU has what it had before."""
        if "update" in str(error) and str(error) not in self.seen:
            self.believed = dict(self.on_the_npu)
        self.seen.add(str(error))

    def send(self) -> None:
        """What the journal lets go is on its way."""
        operation = self.journal.next_to_send(2)
        if operation is not None:
            self.inbox.append(operation)

    def send_early(self) -> None:
        """A batch between the tensors of its update, which are still on their way."""
        update = self.inbox[-1] if self.inbox else None
        if isinstance(update, WeightUpdate):
            early = self.journal.early_batch(update, 2, 4 + DATA.nbytes)
            self.inbox += [early] if early is not None else []
            assert self.journal.early_batch(update, 2, 4 + DATA.nbytes - 1) is None

    def serve(self) -> None:
        """The server answers, loads or refuses the oldest operation."""
        if not self.inbox:
            return
        operation, *behind = self.inbox
        if isinstance(operation, WeightUpdate) and behind and isinstance(behind[0], SentBatch):
            # Its first layers may be answered already; if the update is refused it fails nevertheless.
            assert self.journal.current_batch(behind[0].batch_id) is behind[0]
            behind[0].tensors[0] = DATA
        self.inbox.pop(0)
        if isinstance(operation, SentBatch):
            self.answers[operation] = dict(self.on_the_npu)
            operation.tensors[0] = DATA
            self.journal.batch_done(operation.batch_id)
        elif POISON in operation.tensors.values():
            self.end(InvalidInput(f"update {operation.version} is refused"))
        else:
            self.on_the_npu |= {name: float(value) for name, value in operation.tensors.items()}
            self.journal.weights_loaded(operation.version)

    def die(self) -> None:
        """The server is lost; another one takes over from what the client holds."""
        head = self.journal.head
        deadly = self.journal.server_died() == 2 and head is not None
        kind = f"update {head.version}" if isinstance(head, WeightUpdate) else "batch"
        self.end(DeviceFault(f"a deadly {kind}") if deadly else None)
        assert {n: float(v) for n, v in self.journal.confirmed.tensors.items()} == self.on_the_npu

    def end(self, error: NpuError | None) -> None:
        """The stream ends and another one begins."""
        if error is not None:
            self.journal.fail_head(error)
        self.journal.rewind(LAYER_MAP)
        self.inbox.clear()


@settings(deadline=None, max_examples=500)
@given(random=st.randoms(use_true_random=True))
def test_answers_come_from_the_weights_of_their_batch(random: Random) -> None:
    """In any order of pushes, batches, refusals, deaths and looks, however much is on its way."""
    world = Simulation()
    for _ in range(random.randint(1, 80)):
        event = random.choice(["push", "submit", "look", *["send", "send_early", "serve"] * 3, "die"])
        if event == "push":
            world.push(random.choice("ab"), random.choice([1.0, 2.0, 3.0, POISON]))
        else:
            getattr(world, event)()
    for _ in range(200):
        world.send()
        world.serve()
    assert world.journal.head is None
    for batch, believed in world.batches:
        assert (batch in world.answers) != (batch.error is not None)
        assert world.answers.get(batch, believed) == believed


def test_after_a_death_there_is_one_suspect() -> None:
    """What a server died of is sent alone, until there is an answer; before and after, all that may be."""
    world = Simulation()
    for _ in range(3):
        world.submit()
    one, two, three = (batch for batch, _ in world.batches)

    def sent() -> list[Operation | None]:
        return [world.journal.next_to_send(2) for _ in range(3)]

    assert sent() == [one, two, None]
    world.die()
    assert sent() == [one, None, None]
    world.inbox.append(one)
    world.serve()
    assert sent() == [two, three, None]
