"""How a server ends: in order, in time, and with its parent."""

import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from fake_backend import FakeBackend, Spawn, Start, wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from raw_client import Raw, attach, input_chunk
from test_turns import SlowCompiler

from npu_server.app import SHUTDOWN_S
from npu_server.config import ServeConfig
from npu_wire.layer_map import Int8Array
from npu_wire.v1 import npu_pb2
from trainer_client.npu.connection import connect

TIMEOUT_S = 60.0
RANGES = {"t0": (-1.0, 1.0)}
SERVING = health_pb2.HealthCheckResponse.SERVING


def serves(address: str) -> bool:
    """What the health service says; a server that is gone does not serve."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        except grpc.RpcError:
            return False
    return bool(answer.status == SERVING)


def test_programs_close_before_the_device_however_many_jobs_wait(start: Start, backend: FakeBackend) -> None:
    """Twelve batches of three sessions wait for a device that is busy when the grace is over."""
    server = start()
    raw, attached = Raw(server.address), threading.Event()

    def requests(session_id: str) -> Iterator[npu_pb2.ForwardRequest]:
        yield attach(session_id)
        attached.wait()
        yield from (input_chunk(k) for k in range(1, 5))
        yield from raw.silence()

    calls = [raw.stub.Forward(requests(raw.compile())) for _ in range(3)]
    for call in calls:
        next(call)
    backend.gate.clear()
    attached.set()
    assert backend.layer_began.acquire(timeout=TIMEOUT_S)
    wait_until(lambda: server.status().queue_depth == 11)
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(server.close, 0.0)
        wait_until(lambda: server.sessions.count() == 0)
        backend.gate.set()
        closing.result(TIMEOUT_S)
    raw.ended.set()
    assert backend.calls[-4:] == ["program closed"] * 3 + ["close"]
    assert backend.calls.count("layer 0") == 1
    assert all(isinstance(call.exception(), grpc.RpcError) for call in calls)


def test_the_program_of_a_model_that_still_compiles_closes_before_the_device(start: Start) -> None:
    """Compiling runs beside the device's thread, but ends before the device does."""
    backend = SlowCompiler()
    server = start(backend)
    raw = Raw(server.address)
    with ThreadPoolExecutor() as pool:
        compiling = pool.submit(raw.compile, b"slow")
        assert backend.compiling.wait(TIMEOUT_S)
        closing = pool.submit(server.close, 0.0)
        assert isinstance(compiling.exception(TIMEOUT_S), grpc.RpcError)
        backend.compiled.set()
        closing.result(TIMEOUT_S)
    assert backend.calls == ["open", "compile", "program closed", "close"]


def test_a_health_watch_does_not_delay_the_end(spawn: Spawn, tmp_path: Path) -> None:
    """A call that never ends by itself is no work to wait for."""
    child = spawn("--grace-s", "1000")
    with grpc.insecure_channel(f"unix:{tmp_path}/child.sock") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        child.send_signal(signal.SIGTERM)
        assert child.wait(TIMEOUT_S) == 0


def test_the_end_of_stdin_and_a_signal_are_one_wish(plugin: None, tmp_path: Path, batch: Int8Array) -> None:
    """A parent that closes the pipe and sends SIGTERM: the device finishes and is closed."""
    address, gate, log = f"unix:{tmp_path}/child.sock", tmp_path / "gate", tmp_path / "log"
    command = [sys.executable, "-m", "npu_server", "serve", "--backend", "fake", "--listen", address]
    command += ["--http", "off", "--exit-with-stdin", "--grace-s", "1000"]
    command += ["--backend-option", f"gate={gate}", "--backend-option", f"log={log}"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline().startswith(b"listening on")
        with connect(address, reconnect_timeout_s=0.1) as npu:
            npu.compile(b"model", RANGES).submit({"t0": batch}, range(3)).tensor(0)
            child.stdin.close()
            wait_until(lambda: not serves(address))
            child.terminate()
            gate.touch()
            assert child.wait(TIMEOUT_S) == 0
        assert log.read_text().splitlines()[-2:] == ["program closed", "close"]
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


_PARENT = """
import os, signal, subprocess, sys
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
server.stdout.readline()
fork = os.fork()
if fork:
    print(server.pid, fork, flush=True)
signal.pause()
"""


def test_a_fork_of_the_parent_does_not_keep_the_server(plugin: None, tmp_path: Path) -> None:
    """The parent is killed; its fork holds the server's standard input open."""
    command = [sys.executable, "-m", "npu_server", "serve", "--backend", "fake", "--http", "off"]
    command += ["--listen", f"unix:{tmp_path}/child.sock", "--exit-with-stdin"]
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, *command], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    server, fork = (int(word) for word in parent.stdout.readline().split())
    end_of_server = os.pidfd_open(server)
    try:
        parent.kill()
        parent.wait()
        assert select.select([end_of_server], [], [], TIMEOUT_S)[0]
    finally:
        os.kill(fork, signal.SIGKILL)
        os.close(end_of_server)
        parent.stdout.close()


def test_compose_waits_for_the_shutdown() -> None:
    """The container is not killed while the server may still be closing its device."""
    compose = (Path(__file__).parents[2] / "docker-compose.yml").read_text()
    (period,) = re.findall(r"stop_grace_period: (\d+)s", compose)
    assert int(period) > ServeConfig().grace_s + SHUTDOWN_S
