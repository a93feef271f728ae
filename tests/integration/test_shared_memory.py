"""Tensors through memory that a server shares with a client of its own host and user."""

import contextlib
import gc
import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_backend import LAYERS, FakeBackend, Spawn, Start, expected, wait_until
from raw_client import Raw
from test_held_memory import batch as batch_messages
from test_held_memory import tensors as tensors_of

from npu_server.app import RunningServer
from npu_server.seam import BackendOptions
from npu_server.service import rendezvous
from npu_wire.layer_map import Int8Array
from npu_wire.shared_memory import NotShared, open_window
from npu_wire.v1 import npu_pb2
from trainer_client.npu.connection import Connection, connect
from trainer_client.npu.lifetime import HeldSession

RANGES = {"t0": (-1.0, 1.0)}
TENSOR = 4 * 2 * 64 * 64
SHARED = "tensors in shared memory"


def codes(seed: int, samples: int = 4, size: int = 64) -> Int8Array:
    """A batch whose layers have 32 KB each."""
    return np.random.default_rng(seed).integers(-128, 128, (samples, 2, size, size), dtype=np.int8)


@pytest.fixture
def device() -> FakeBackend:
    """A device with inputs of (2, 64, 64)."""
    return FakeBackend(BackendOptions(extra={"size": "64"}))


def is_shared(array: Int8Array) -> bool:
    """Whether it lies in a mapping of a server's memory, as the kernel says."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(x, 16) for x in line.split()[0].split("-"))
        if begin <= address < end:
            return "/memfd:npu-tensors" in line
    raise AssertionError("it lies nowhere")


def run(session: HeldSession, data: Int8Array) -> list[Int8Array]:
    """Every layer of a batch; their bits are right, wherever they lie."""
    pending = session.submit({"t0": data}, range(LAYERS))
    found = [pending.tensor(layer) for layer in range(LAYERS)]
    for layer in range(LAYERS):
        np.testing.assert_array_equal(expected(data, layer), found[layer])
    return found


def shared_session(npu: Connection) -> HeldSession:
    """A session that has picked its memory up: a batch may overtake that."""
    session = npu.compile(b"model", RANGES)
    wait_until(lambda: all(map(is_shared, run(session, codes(0)))))
    return session


@pytest.fixture(params=["unix", "tcp"])
def server(
    start: Start, device: FakeBackend, tmp_path: Path, request: pytest.FixtureRequest
) -> RunningServer:
    """A server on a unix socket or on loopback, with that device."""
    return start(device, listen="127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/npu.sock")


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_tensors_are_read_where_the_server_put_them(server: RunningServer) -> None:
    """Neither NumPy nor torch copies them, and nobody can write to them by way of NumPy."""
    torch = pytest.importorskip("torch")
    with connect(server.address) as npu:
        session = shared_session(npu)
        tensor = run(session, codes(1))[-1]
        assert is_shared(tensor)
        assert is_shared(torch.frombuffer(tensor.transpose(0, 2, 3, 1), dtype=torch.int8).numpy())
        with pytest.raises(ValueError, match="read-only"):
            tensor[0] = 1
        assert session.way.endswith(SHARED)
        assert repr(npu) == f"<NPU fake, profile plus-one, at {server.address}, {SHARED}>"


def test_a_held_tensor_stays_and_a_dropped_one_makes_room(start: Start, device: FakeBackend) -> None:
    """Hundreds of batches later; memory is that of what is held at once, and a view holds as well."""
    server = start(device)
    with connect(server.address) as npu:
        session = shared_session(npu)
        held = [run(session, codes(seed))[1][:, :1] for seed in range(5)]
        gc.collect()
        for seed in range(300):
            run(session, codes(seed))
        # Five are held; three are the last batch's, and of the one before not all may be back yet.
        assert server.rendezvous.committed <= (5 + 3 * LAYERS) * TENSOR
        assert all(map(is_shared, held))
        for seed, tensor in enumerate(held):
            np.testing.assert_array_equal(expected(codes(seed), 1)[:, :1], tensor)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_a_torch_tensor_holds_its_bytes(start: Start, device: FakeBackend) -> None:
    """Made without a copy, it is all that is left of the NPU's tensor."""
    torch = pytest.importorskip("torch")
    with connect(start(device).address) as npu:
        session = shared_session(npu)
        tensor = torch.frombuffer(run(session, codes(77))[2].transpose(0, 2, 3, 1), dtype=torch.int8)
        for seed in range(50):
            run(session, codes(seed))
        due = expected(codes(77), 2).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(due.reshape(-1), tensor.numpy())


def test_what_does_not_fit_comes_in_messages(start: Start, device: FakeBackend) -> None:
    """Room for five tensors: the others are sent, none waits for another to be dropped."""
    with connect(start(device, max_shared_bytes=5 * TENSOR).address) as npu:
        session = shared_session(npu)
        held = [tensor for seed in range(10) for tensor in run(session, codes(seed))]
        assert sum(map(is_shared, held)) == 5
        for index, tensor in enumerate(held):
            np.testing.assert_array_equal(expected(codes(index // LAYERS), index % LAYERS), tensor)
        del held, tensor
        wait_until(lambda: all(map(is_shared, run(session, codes(0)))))


def test_streams_share_the_server_s_bound(start: Start, device: FakeBackend) -> None:
    """Two sessions together never commit more than there is; one that ends leaves its part to the other."""
    server = start(device, max_shared_bytes=6 * TENSOR)
    with connect(server.address) as npu:
        first, second = shared_session(npu), shared_session(npu)
        held = [tensor for seed in range(10) for s in (first, second) for tensor in run(s, codes(seed))]
        assert sum(map(is_shared, held)) == 6
        assert server.telemetry.registry.get_sample_value("npu_shared_bytes") == 6 * TENSOR
        first.close()
        del held
        wait_until(lambda: server.rendezvous.committed <= 3 * TENSOR)
        held = [tensor for seed in range(10) for tensor in run(second, codes(seed))]
        assert sum(map(is_shared, held)) == 6


def test_nothing_is_shared_unless_both_want_it(start: Start, device: FakeBackend, tmp_path: Path) -> None:
    """Off on the server, or off on the client: the way says which."""
    off = start(device, max_shared_bytes=0)
    with connect(off.address) as npu:
        session = npu.compile(b"model", RANGES)
        assert not any(map(is_shared, run(session, codes(0))))
        assert "the server offers no shared memory" in session.way
    on = start(device, listen=f"unix:{tmp_path}/other.sock")
    with connect(on.address, shared_memory=False) as npu:
        session = npu.compile(b"model", RANGES)
        assert not any(map(is_shared, run(session, codes(0))))
        assert session.way == f"{on.address}, tensors in its messages"


def test_a_server_that_may_have_no_socket_sends_messages(
    start: Start, device: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some sandboxes allow none: the server starts, and says so to its client."""

    def refused(name: str) -> socket.socket:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(rendezvous, "listen", refused)
    with connect(start(device).address) as npu:
        session = npu.compile(b"model", RANGES)
        assert not any(map(is_shared, run(session, codes(0))))
        assert "the server offers no shared memory" in session.way


ELSEWHERE = """
import sys
sys.path.insert(0, sys.argv[2])
from test_shared_memory import RANGES, codes, connect, is_shared, run
with connect(sys.argv[1]) as npu:
    session = npu.compile(b"model", RANGES)
    print(any(is_shared(t) for seed in range(5) for t in run(session, codes(seed))), session.way)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces and other users")
@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        (("unshare", "--net"), "the server is on another host, or in another container"),
        (("setpriv", "--reuid=1234", "--clear-groups"), "the other end runs as another user"),
    ],
)
def test_who_is_elsewhere_or_another_user_gets_messages(
    start: Start, device: FakeBackend, tmp_path: Path, prefix: tuple[str, ...], reason: str
) -> None:
    """A client in another container that sees the socket's file, and another user's: told why, no names."""
    if shutil.which(prefix[0]) is None:
        pytest.skip(f"needs {prefix[0]}")
    folder = tmp_path
    while folder != folder.parent:  # pytest's folders are private
        folder.chmod(0o755)
        folder = folder.parent
        if folder == Path("/tmp"):
            break
    address = f"unix:{tmp_path}/open.sock"
    start(device, listen=address)
    (tmp_path / "open.sock").chmod(0o777)
    command = [*prefix, sys.executable, "-c", ELSEWHERE, address, str(Path(__file__).parent)]
    client = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert client.stdout == f"False {address}, tensors in its messages, no shared memory: {reason}\n"


def descriptors() -> int:
    """How many this process has open, pipes to its children apart."""
    gc.collect()
    targets = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            targets.append(os.readlink(entry))
    return sum(not target.startswith("pipe:") for target in targets)


def test_tensors_outlive_a_killed_server(spawn: Spawn, tmp_path: Path) -> None:
    """The memory is theirs; the next server shares its own, and nothing is left open."""
    address = f"unix:{tmp_path}/child.sock"
    size = ("--backend-option", "size=64")
    child = spawn(*size)
    with connect(address, timeout_s=20) as npu:
        session = shared_session(npu)
        open_before = descriptors()
        for _ in range(3):
            held = run(session, codes(5))
            child.send_signal(signal.SIGKILL)
            child.wait()
            child = spawn(*size)
            wait_until(lambda: all(map(is_shared, run(session, codes(6)))))
            for layer in range(LAYERS):
                np.testing.assert_array_equal(expected(codes(5), layer), held[layer])
        del held
        wait_until(lambda: descriptors() <= open_before)


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from test_shared_memory import codes, connect, run, shared_session
npu = connect(sys.argv[1])
sessions = [shared_session(npu), shared_session(npu)]
held = [run(session, codes(3)) for session in sessions]
print("holding", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_killed_client_leaves_nothing_on_the_server(start: Start, device: FakeBackend) -> None:
    """Neither memory nor descriptor nor thread of its streams."""
    server = start(device)

    def state() -> tuple[int, set[str]]:
        return server.rendezvous.committed, {t.name for t in threading.enumerate() if "reader" in t.name}

    assert state() == (0, set())
    counts = []
    for _ in range(3):
        command = [sys.executable, "-c", KILLED, server.address, str(Path(__file__).parent)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "holding\n"
            assert server.rendezvous.committed >= 2 * LAYERS * TENSOR
            client.kill()
        wait_until(lambda: state() == (0, set()))
        gc.collect()  # what other tests have left in this process
        wait_until(lambda: "npu-tensors" not in Path("/proc/self/maps").read_text())
        counts.append(descriptors())
    assert counts[0] == counts[2]


def test_a_forked_process_gives_nothing_back(start: Start, device: FakeBackend) -> None:
    """Its copies of tensors end with it, the trainer's stay as they are."""
    with connect(start(device).address) as npu:
        session = shared_session(npu)
        held = run(session, codes(9))
        child = os.fork()
        if child == 0:  # pragma: no cover
            held.clear()
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        for seed in range(20):
            run(session, codes(seed))
        for layer in range(LAYERS):
            np.testing.assert_array_equal(expected(codes(9), layer), held[layer])


class Hostile:
    """A stream by hand that has picked up its memory by hand, as the comments in proto/ say."""

    def __init__(self, address: str) -> None:
        self.raw = Raw(address)
        self.batches = iter(range(1, 1000))
        self.go_on = threading.Semaphore(0)
        self.answers = self.raw.stub.Forward(self._requests(self.raw.compile()))
        self.offer = next(self.answers).attached.shared_memory

    def _requests(self, session_id: str) -> Iterator[npu_pb2.ForwardRequest]:
        yield npu_pb2.ForwardRequest(attach=npu_pb2.Attach(session_id=session_id, shared_memory=True))
        for batch_id in self.batches:
            self.go_on.acquire()
            if self.raw.ended.is_set():
                return
            yield from batch_messages(batch_id, codes(batch_id))

    def connect(self) -> socket.socket:
        """A socket to the server's."""
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        peer.settimeout(20)
        peer.connect("\0npu-in-the-loop-" + self.offer.socket)
        return peer

    def pick_up(self) -> tuple[socket.socket, int]:
        """The socket and the memory's descriptor."""
        peer = self.connect()
        peer.send(self.offer.token)
        packet, (memory,), _, _ = socket.recv_fds(peer, 8, 1)
        assert struct.unpack("<Q", packet)[0] == os.fstat(memory).st_size
        peer.send(b"\x01")
        return peer, memory

    def next_batch(self) -> list[npu_pb2.ForwardResponse]:
        """The answers to one batch."""
        self.go_on.release()
        answers = []
        for answer in self.answers:
            answers.append(answer)
            if answer.HasField("done"):
                break
        return answers

    def close(self) -> None:
        """Ends the stream."""
        self.go_on.release()
        self.raw.close()


@pytest.fixture
def hostile(start: Start, device: FakeBackend) -> Iterator[Hostile]:
    """A hostile client of a server with that device."""
    client = Hostile(start(device).address)
    yield client
    client.close()


def slots(answers: list[npu_pb2.ForwardResponse]) -> list[npu_pb2.SharedSlice]:
    """Where tensors lie."""
    return [answer.tensor.shared for answer in answers if answer.tensor.HasField("shared")]


def shared_slots(hostile: Hostile) -> list[npu_pb2.SharedSlice]:
    """Those of the first batch that comes through memory alone."""
    found: list[npu_pb2.SharedSlice] = []

    def all_shared() -> bool:
        found[:] = slots(hostile.next_batch())
        return len(found) == LAYERS

    wait_until(all_shared)
    return found


def test_the_memory_can_be_neither_written_nor_shrunk(hostile: Hostile) -> None:
    """Its descriptor is good for reading; what the comments in proto/ say is enough to read it."""
    _, memory = hostile.pick_up()
    for slot in shared_slots(hostile):
        assert os.pread(memory, slot.length, slot.offset)
    size = os.fstat(memory).st_size
    with pytest.raises(PermissionError):
        mmap.mmap(memory, size)
    for change in (
        lambda: os.ftruncate(memory, 4096),
        lambda: os.ftruncate(memory, 2 * size),
        lambda: os.pwrite(memory, b"x", 0),
    ):
        with pytest.raises(OSError, match="Operation not permitted"):
            change()
    os.close(memory)


@pytest.mark.parametrize(
    "lie",
    [
        lambda slots: struct.pack("<Q", slots[0].slot) * 2,  # the same twice
        lambda slots: struct.pack("<Q", 2**63),  # one that there never was
        lambda slots: b"\x01\x02\x03",  # no number
        lambda slots: b"",  # nothing
    ],
)
def test_lies_about_slots_cost_their_teller_the_memory(hostile: Hostile, lie: object) -> None:
    """The stream goes on in messages, with the right bits."""
    peer, memory = hostile.pick_up()
    found = shared_slots(hostile)
    peer.send(lie(found))  # type: ignore[operator]
    answers = hostile.next_batch()
    assert slots(answers) == []
    for (batch_id, layer), tensor in tensors_of(iter(answers)).items():
        np.testing.assert_array_equal(expected(codes(batch_id), layer), tensor)
    os.close(memory)


def test_a_token_is_good_for_one_connection_of_its_stream(hostile: Hostile) -> None:
    """Another token, none, or the same again: the server hangs up."""
    wrong = hostile.connect()
    wrong.send(bytes(32))
    assert wrong.recv(100) == b""
    silent = hostile.connect()
    silent.close()
    _, memory = hostile.pick_up()
    again = hostile.connect()
    again.send(hostile.offer.token)
    assert again.recv(100) == b""
    assert len(shared_slots(hostile)) == LAYERS
    os.close(memory)


def test_an_offer_ends_with_its_stream(start: Start, device: FakeBackend) -> None:
    """Who keeps a token for later has nothing; the message holds no name."""
    server = start(device)
    client = Hostile(server.address)
    client.close()
    wait_until(lambda: server.sessions.status()[0].attached is False)
    with pytest.raises(NotShared, match="does not know the connection") as caught:
        open_window(client.offer.socket, client.offer.token)
    assert client.offer.socket not in str(caught.value)
    server.close()
    with pytest.raises(NotShared, match="on another host") as caught:
        open_window(client.offer.socket, client.offer.token)
    assert client.offer.socket not in str(caught.value)
