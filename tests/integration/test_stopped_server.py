"""A server that stands still (stopped, starved, paused with its machine) blames nobody for it."""

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fake_backend import Spawn
from raw_client import Raw, attach, begin, weight_chunk

from npu_wire.v1 import npu_pb2

STALL_S = 2.0


def test_who_spoke_while_the_server_stood_still_has_not_been_silent(spawn: Spawn, tmp_path: Path) -> None:
    """A Compile call and a weight update that go on meanwhile are heard afterwards."""
    process = spawn("--stall-s", str(STALL_S), listen=f"unix:{tmp_path}/stopped.sock")
    raw = Raw(f"unix:{tmp_path}/stopped.sock")
    speak = threading.Event()

    def after_a_pause(*messages: object) -> Iterator[object]:
        speak.wait()
        yield from messages

    stream = raw.stub.Forward(
        itertools.chain([attach(raw.compile()), begin(1)], after_a_pause(weight_chunk(1)))
    )
    next(stream)
    header = npu_pb2.CompileRequest(header=npu_pb2.CompileHeader(model_bytes=5))
    compiling = raw.stub.Compile.future(after_a_pause(header, npu_pb2.CompileRequest(model_chunk=b"model")))
    raw.stub.Describe(npu_pb2.DescribeRequest())
    process.send_signal(signal.SIGSTOP)
    time.sleep(2 * STALL_S)  # the time in which the server does not run is what this is about
    speak.set()
    process.send_signal(signal.SIGCONT)
    assert compiling.result(timeout=60).session_id
    assert next(stream).weights_loaded.duration_ns > 0
    raw.ended.set()
