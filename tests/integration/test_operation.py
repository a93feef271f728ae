"""What an operator meets: health, reflection, TLS, tokens, leases, HTTP, signals, addresses."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme
from fake_backend import LAYERS, FakeBackend, Spawn, Start, expected
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from npu_server.app import SERVICE_NAME, serve
from npu_server.config import ServeConfig
from npu_server.seam import BackendOptions
from npu_wire.channel import Security, parse_endpoint
from npu_wire.errors import InvalidInput, ServerUnavailable, Unauthenticated
from npu_wire.layer_map import Int8Array
from npu_wire.v1 import npu_pb2, npu_pb2_grpc
from trainer_client.npu.connection import Connection, connect
from trainer_client.npu.transport import Transport

RANGES = {"t0": (-1.0, 1.0)}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health_of(address: str, service: str = SERVICE_NAME) -> int:
    """Asks the standard health service."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)


def test_standard_health_service(start: Start) -> None:
    """As a Kubernetes probe asks it, for the server and for the service; without the token, too."""
    token = Path(__file__)  # any file that is no token is refused
    with pytest.raises(InvalidInput, match="one word"):
        start(token_file=token)
    server = start()
    assert health_of(server.address) == SERVING
    assert health_of(server.address, "") == SERVING


def test_reflection_lists_the_service(start: Start) -> None:
    """Grpcurl and friends find the schema."""
    with grpc.insecure_channel(start().address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]))
    names = {service.name for service in answer.list_services_response.service}
    assert {"npu_wire.v1.NpuService", "grpc.health.v1.Health"} <= names


def test_describe_tells_device_and_quotas(npu: Connection) -> None:
    """What the fake says of itself reaches the client."""
    info = npu.info
    assert (info.fingerprint.backend, info.profile, info.profile_hash) == ("fake", "plus-one", "0" * 64)
    assert (info.operators, info.max_batch, info.location) == (("Add",), 64, "cpu")


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A file as --token-file wants it."""
    path = tmp_path / "token"
    path.write_text("open-sesame\n")
    return path


def test_a_token_is_needed_where_one_is_set(start: Start, token_file: Path, batch: Int8Array) -> None:
    """Right passes, wrong and none are Unauthenticated; health needs none."""
    address = start(token_file=token_file).address
    with connect(address, token="open-sesame") as npu:
        session = npu.compile(b"model", RANGES)
        np.testing.assert_array_equal(expected(batch, 2), session.submit({"t0": batch}, ()).tensor(2))
    for token in (None, "open-sesam"):
        with pytest.raises(Unauthenticated, match="token"):
            connect(address, token=token)
    assert health_of(address) == SERVING


def test_a_token_never_travels_unencrypted() -> None:
    """Refused before anything is sent."""
    with pytest.raises(InvalidInput, match="tls_ca"):
        connect("npu.example:50051", token="open-sesame")


class Certificates:
    """Files of a throw-away authority."""

    def __init__(self, folder: Path, name: str = "localhost") -> None:
        folder.mkdir(exist_ok=True)
        self.ca, self.cert, self.key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
        authority = trustme.CA()
        issued = authority.issue_cert(name)
        authority.cert_pem.write_to_path(str(self.ca))
        issued.private_key_pem.write_to_path(str(self.key))
        issued.cert_chain_pems[0].write_to_path(str(self.cert))


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    """A server's certificate for localhost."""
    return Certificates(tmp_path)


def test_tls(start: Start, certificates: Certificates, batch: Int8Array) -> None:
    """Encrypted with the right authority; in the clear or with the system's authorities nothing goes."""
    server = start(listen="localhost:0", tls_cert=certificates.cert, tls_key=certificates.key)
    with connect(server.address, tls_ca=certificates.ca) as npu:
        session = npu.compile(b"model", RANGES)
        np.testing.assert_array_equal(expected(batch, 2), session.submit({"t0": batch}, ()).tensor(2))
    with pytest.raises(ServerUnavailable, match=r"Socket closed.* check address and TLS settings"):
        connect(server.address, timeout_s=0.5)
    with pytest.raises(Unauthenticated, match=r"signed by no authority that is trusted here.*tls_ca=FILE"):
        connect(server.address, tls=True)


def test_a_server_that_is_not_to_be_trusted(start: Start, certificates: Certificates, tmp_path: Path) -> None:
    """Another authority's, another name's, or none at all: what is wrong is said at once, and by its name."""
    other = Certificates(tmp_path / "other", "elsewhere.example")
    server = start(listen="localhost:0", tls_cert=certificates.cert, tls_key=certificates.key)
    with pytest.raises(Unauthenticated, match="signed by no authority that is trusted here"):
        connect(server.address, tls_ca=other.ca)
    command = [sys.executable, "-m", "npu_server", "describe", "--endpoint", server.address, "--tls"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"error: no trust in the server at {server.address}: its certificate is signed" in told.stderr
    server = start(listen="localhost:0", tls_cert=other.cert, tls_key=other.key)
    with pytest.raises(Unauthenticated, match="its certificate is for another name"):
        connect(server.address, tls_ca=other.ca)
    server = start(listen="localhost:0")
    with pytest.raises(Unauthenticated, match="it does not speak TLS"):
        connect(server.address, tls_ca=other.ca)


IGNORED = {
    "profile, backend": ("host:1", {"profile": "tflm", "backend": "emulator"}),
    "device": ("unix:/tmp/npu.sock", {"device": "cpu"}),
    "tls, token": (None, {"tls": True, "token": "secret"}),
    "tls_ca": (None, {"tls_ca": "ca.pem"}),
}


@pytest.mark.parametrize("names", IGNORED)
def test_what_would_be_ignored_is_refused(names: str) -> None:
    """An embedded server's settings beside an endpoint, an endpoint's settings without one."""
    endpoint, settings = IGNORED[names]
    with pytest.raises(InvalidInput, match=f"^{names}: .*leave them out"):
        connect(endpoint, **settings)  # type: ignore[arg-type]


def test_mutual_tls(start: Start, certificates: Certificates) -> None:
    """With a client authority the client must show a certificate."""
    files = {"tls_cert": certificates.cert, "tls_key": certificates.key, "tls_client_ca": certificates.ca}
    server = start(listen="localhost:0", **files)
    with connect(
        server.address, tls_ca=certificates.ca, tls_cert=certificates.cert, tls_key=certificates.key
    ) as npu:
        assert npu.info.fingerprint.backend == "fake"
    with pytest.raises(ServerUnavailable):
        connect(server.address, tls_ca=certificates.ca, timeout_s=0.5)


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_lease_ends_and_an_open_stream_keeps_it(
    backend: FakeBackend, tmp_path: Path, batch: Int8Array
) -> None:
    """Idle for longer than the lease: released, program closed. With a stream: never."""
    clock = Clock()
    config = ServeConfig(listen=f"unix:{tmp_path}/npu.sock", http="off", lease_s=10)
    with serve(backend, config, clock) as server, connect(server.address) as npu:
        session = npu.compile(b"model", RANGES)
        session.submit({"t0": batch}, ()).tensor(2)  # so the stream is open
        with grpc.insecure_channel(server.address) as channel:
            stub = npu_pb2_grpc.NpuServiceStub(channel)
            header = npu_pb2.CompileHeader(model_bytes=1)
            messages = [npu_pb2.CompileRequest(header=header), npu_pb2.CompileRequest(model_chunk=b"m")]
            idle = stub.Compile(iter(messages)).session_id
            clock.now = 9
            stub.KeepAlive(npu_pb2.KeepAliveRequest(session_id=idle))
            clock.now = 18
            assert (server.sessions.reap(), server.sessions.count()) == (0, 2)
            clock.now = 20
            server.sessions.reap()  # the server's own reaper may have been quicker
            assert server.sessions.count() == 1
            with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
                stub.KeepAlive(npu_pb2.KeepAliveRequest(session_id=idle))
        np.testing.assert_array_equal(expected(batch, 2), session.submit({"t0": batch}, ()).tensor(2))
    assert backend.calls.count("program closed") == 2
    assert backend.calls[-1] == "close"


def get(url: str) -> tuple[int, str]:
    """Status and text of a page."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_http_side(start: Start, batch: Int8Array) -> None:
    """Health, Prometheus text and JSON status count what was done."""
    server = start(http="127.0.0.1:0")
    base = f"http://{server.http_address}"
    with connect(server.address) as npu:
        session = npu.compile(b"model", RANGES)
        for _ in range(3):
            session.submit({"t0": batch}, range(LAYERS)).tensor(2)
        session.submit({"t0": batch}, ()).tensor(2)
        status = json.loads(get(f"{base}/api/v1/status")[1])
        metrics = get(f"{base}/metrics")[1]
        assert get(f"{base}/healthz") == (200, '{"status":"serving"}')
    assert status["device"]["backend"] == "fake"
    (one,) = status["sessions"]
    layers = {layer["name"]: layer["batches"] for layer in one["layers"]}
    assert layers == {"t1": 3, "t2": 3, "t3": 4}
    assert status["bytes_in"] == 4 * batch.nbytes
    assert 'npu_layer_seconds_count{op="Add"} 10.0' in metrics
    assert "npu_sessions 1.0" in metrics
    assert 'npu_tensor_bytes_total{direction="in"} 640.0' in metrics


def test_two_servers_have_registries_of_their_own(start: Start, tmp_path: Path) -> None:
    """No global metric registry: a second server in the process starts."""
    start()
    start(listen=f"unix:{tmp_path}/second.sock")


def test_sigterm_finishes_what_is_queued(spawn: Spawn, tmp_path: Path, batch: Int8Array) -> None:
    """The batch in flight is answered, the exit status is 0, the socket is gone."""
    gate = tmp_path / "gate"
    child = spawn("--backend-option", f"gate={gate}")
    with connect(f"unix:{tmp_path}/child.sock", reconnect_timeout_s=0.1) as npu:
        pending = npu.compile(b"model", RANGES).submit({"t0": batch}, range(LAYERS))
        pending.tensor(0)
        child.send_signal(signal.SIGTERM)
        gate.touch()
        np.testing.assert_array_equal(expected(batch, 2), pending.tensor(2))
        assert child.wait(20) == 0
    assert not (tmp_path / "child.sock").exists()


def test_the_second_signal_ends_at_once(spawn: Spawn, tmp_path: Path, batch: Int8Array) -> None:
    """A device that hangs does not keep the process."""
    child = spawn("--backend-option", f"gate={tmp_path}/never", "--grace-s", "1000")
    with connect(f"unix:{tmp_path}/child.sock", reconnect_timeout_s=0.1) as npu:
        npu.compile(b"model", RANGES).submit({"t0": batch}, range(LAYERS)).tensor(0)
        child.send_signal(signal.SIGTERM)
        while health_or_gone(f"unix:{tmp_path}/child.sock") == SERVING:
            pass
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 128 + signal.SIGINT


def test_a_signal_that_another_thread_gets_ends_the_server(spawn: Spawn) -> None:
    """The kernel may choose any; Python's handlers run in the main one, which waits."""
    child = spawn()
    other = max(int(name) for name in os.listdir(f"/proc/{child.pid}/task"))
    assert other != child.pid
    assert ctypes.CDLL(None).tgkill(child.pid, other, signal.SIGTERM) == 0
    assert child.wait(20) == 0


def health_or_gone(address: str) -> int:
    """Health, where a server that is gone does not serve."""
    try:
        return health_of(address)
    except grpc.RpcError:
        return NOT_SERVING


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_unix_socket_in_use(start: Start, batch: Int8Array) -> None:
    """GRPC would silently take the path over; the first server goes on."""
    server = start()
    with pytest.raises(InvalidInput, match="another server is there"):
        start(FakeBackend(BackendOptions()))
    with connect(server.address) as npu:
        last = npu.compile(b"model", RANGES).submit({"t0": batch}, ()).tensor(2)
    np.testing.assert_array_equal(expected(batch, 2), last)


@pytest.mark.parametrize("flag", ["--listen", "--http"])
def test_an_address_in_use(plugin: None, taken: str, flag: str) -> None:
    """Exit status 1 and a message that names address and flag."""
    free = {"--listen": "127.0.0.1:0", "--http": "off"} | {flag: taken}
    command = [sys.executable, "-m", "npu_server", "serve", "--backend", "fake"]
    for pair in free.items():
        command += pair
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1
    assert taken in ended.stderr.splitlines()[-1]
    assert flag in ended.stderr.splitlines()[-1]


def test_describe_over_the_wire(start: Start, token_file: Path) -> None:
    """The command prints what the server says, as JSON and as a table."""
    address = start(token_file=token_file).address
    command = [sys.executable, "-m", "npu_server", "describe", "--endpoint", address]
    command += ["--token-file", str(token_file)]
    answer = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    assert json.loads(answer)["fingerprint"]["profile"] == "plus-one"
    assert "plus-one" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    remote = [*command[:5], "board-7:50051", *command[6:]]
    kept = subprocess.run(remote, capture_output=True, text=True, check=False)
    assert (kept.returncode, kept.stdout) == (1, "")
    assert "would travel unencrypted; use TLS" in kept.stderr
    refused = subprocess.run(command[:-2], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")


def test_calls_on_a_closed_channel_are_an_error_of_ours(start: Start) -> None:
    """A thread that looks for its server while another closes the connection hears one of our errors."""
    transport = Transport(parse_endpoint(start(FakeBackend(BackendOptions())).address), Security())
    transport.close()
    with pytest.raises(ServerUnavailable, match="is closed; connect again"):
        transport.describe(1.0, wait_for_ready=False)
    with pytest.raises(ServerUnavailable, match="is closed; connect again"):
        transport.compile(b"model", {}, 1.0)
    transport.release("a session")  # says nothing: its lease ends it
