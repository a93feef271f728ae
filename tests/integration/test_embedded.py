"""The server that a connection starts for itself: drained, stopped once, and never left behind."""

import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from embedded_backends import diary
from fake_backend import expected

from npu_wire.errors import InvalidInput
from npu_wire.layer_map import Int8Array
from trainer_client.npu.connection import connect

RANGES = {"t0": (-1.0, 1.0)}

TRAINER = """
import os, sys
from trainer_client import connect
npu = connect(backend="fake")
print(npu.embedded.pid, npu.embedded.endpoint.path, flush=True)
"""


def ends(pid: int) -> bool:
    """Whether a process that is not our child ends soon."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ready, _, _ = select.select([descriptor], [], [], 20)
    os.close(descriptor)
    return bool(ready)


def trainer(then: str) -> "subprocess.Popen[str]":
    """A process that connects to a server of its own, prints its pid and socket, and does something."""
    code = [sys.executable, "-c", TRAINER + then]
    return subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_server_that_prints_much_is_not_held_up(plugin: None, batch: Int8Array) -> None:
    """Megabytes on both of its outputs, more than any pipe holds."""
    with connect(backend="chatty", timeout_s=20) as npu:
        session = npu.compile(b"model", RANGES)
        for _ in range(3):
            np.testing.assert_array_equal(expected(batch, 2), session.submit({"t0": batch}, ()).tensor(2))


def test_closing_lets_the_device_close(plugin: None, batch: Int8Array) -> None:
    """One termination, not two: the server comes to the end of its shutdown, every time."""
    for times in (1, 2, 3):
        with connect(backend="fake") as npu:
            npu.compile(b"model", RANGES).submit({"t0": batch}, ()).tensor(2)
        assert diary().count("close") == times


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_trainer_leaves_neither_server_nor_folder(plugin: None, number: signal.Signals) -> None:
    """It cannot clean up; the server notices its end, closes the device and removes the rest."""
    with trainer(f"os.kill(os.getpid(), {number})") as parent:
        assert parent.stdout is not None
        pid, path = parent.stdout.readline().split()
    assert parent.returncode == -number
    assert ends(int(pid))
    assert diary()[-1] == "close"
    assert not Path(path).parent.exists()


def test_a_forked_process_does_not_keep_the_server(plugin: None) -> None:
    """The trainer is killed while a process that it forked, with copies of all descriptors, lives on."""
    then = """
if os.fork() == 0:
    sys.stdin.read()  # until the test is over
    os._exit(0)
os.kill(os.getpid(), 9)
"""
    with trainer(then) as parent:
        assert parent.stdout is not None
        pid, _ = parent.stdout.readline().split()
        parent.wait()
        assert ends(int(pid))


def test_the_end_of_a_forked_process_ends_no_server(plugin: None) -> None:
    """Its exit handlers are the trainer's; the trainer's server and session are not its own to close."""
    then = """
import numpy as np
session = npu.compile(b"model", {"t0": (-1.0, 1.0)})
one = np.zeros((1, 2, 4, 4), np.int8)
session.submit({"t0": one}, ()).tensor(2)
child = os.fork()
if child == 0:
    import atexit
    atexit._run_exitfuncs()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
session.submit({"t0": one}, ()).tensor(2)
print(npu.embedded.pid, flush=True)
"""
    with trainer(then) as parent:
        assert parent.stdout is not None
        pid, _ = parent.stdout.readline().split()
        assert parent.stdout.readline().split() == [pid]
    assert parent.returncode == 0


def test_a_long_folder_for_temporary_files(
    plugin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: Int8Array
) -> None:
    """A socket's path has room for 107 bytes: another folder is taken, or the limit is named."""
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with connect(backend="fake") as npu:
        np.testing.assert_array_equal(
            expected(batch, 2), npu.compile(b"model", RANGES).submit({"t0": batch}, ()).tensor(2)
        )
    with pytest.raises(InvalidInput, match="at most 107 bytes, this one has"):
        connect(f"unix:{long}/npu.sock")
