"""Memory that is free goes back to the system when sessions end."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_backend import Spawn, wait_until
from raw_client import Raw, attach, begin, memory_of

from npu_wire.tensors import OutgoingTensor
from npu_wire.v1 import npu_pb2

MB = 10**6

_FRAGMENTS = """
import ctypes
import threading

from npu_wire.allocator import return_free_memory


def resident_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def fill_and_free():
    # Too small for pages of their own, and one that stays above them all: nothing shrinks by itself.
    blocks = [ctypes.create_string_buffer(65_536) for _ in range(3_200)]
    pins.append(ctypes.create_string_buffer(65_536))
    del blocks


pins = []
thread = threading.Thread(target=fill_and_free)
thread.start()
thread.join()
before = resident_mib()
return_free_memory()
print(before - resident_mib())
"""


def test_what_is_free_goes_back_to_the_system() -> None:
    """200 MiB in blocks of 64 KiB below one that is in use: glibc keeps them until it is asked."""
    run = subprocess.run([sys.executable, "-c", _FRAGMENTS], capture_output=True, text=True, check=True)
    assert float(run.stdout) > 150


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
    chunks = [begin(1, "big", "bias")]
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
