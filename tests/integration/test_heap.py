"""Freed memory goes back to the system, and not more often than it must."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from fake_backend import Spawn, wait_until
from raw_client import Raw, attach, memory_of

from npu_server.heap import Trimmer
from npu_wire.tensors import OutgoingTensor
from npu_wire.v1 import npu_pb2

MB = 10**6


@pytest.mark.skipif("glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="glibc keeps what is freed")
def test_what_ended_sessions_held_goes_back_to_the_system(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 96 MB of weights in eight streams more than half; the allocator is told to keep it all by itself."""
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", str(2**33))
    process = spawn("--lease-s", "2", listen=f"unix:{tmp_path}/heap.sock")
    raw = Raw(f"unix:{tmp_path}/heap.sock")
    weights = OutgoingTensor("big", np.ones((3, 1000, 1000), np.float32))
    chunks = []
    for offset in weights.offsets(MB):
        request = npu_pb2.ForwardRequest()
        request.weight.weights_version = 1
        weights.write(request.weight.chunk, offset, MB)
        chunks.append(request)
    before = memory_of(process)
    sessions = [raw.compile() for _ in range(8)]
    streams = [raw.stub.Forward(itertools.chain([attach(each)], chunks, raw.silence())) for each in sessions]
    for stream in streams:
        next(stream)
    wait_until(lambda: memory_of(process) > before + 90 * MB)
    for session_id in sessions:
        raw.stub.Release(npu_pb2.ReleaseRequest(session_id=session_id))
    wait_until(lambda: memory_of(process) < before + 45 * MB)
    raw.ended.set()


def test_trimming_is_rare() -> None:
    """Twice after what has ended, ten seconds apart; never while nothing ends."""
    now, trims = [100.0], []
    trimmer = Trimmer(lambda: trims.append(now[0]), lambda: now[0])
    trimmer.check()
    for _ in range(60):
        if now[0] < 125:
            trimmer.something_ended()
        trimmer.check()
        now[0] += 1.0
    assert trims == [100.0, 110.0, 120.0, 130.0, 140.0]
