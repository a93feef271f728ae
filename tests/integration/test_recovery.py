"""What happens when the server dies, hangs, restarts or changes."""

import dataclasses
import logging
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_backend import LAYERS, FakeBackend, Spawn, Start, expected

from npu_wire.errors import DeviceChanged, DeviceFault, ServerUnavailable, SessionLost, Timeout
from npu_wire.layer_map import Int8Array
from trainer_client.npu.connection import Connection, connect

RANGES = {"t0": (-1.0, 1.0)}


def kill(child: "subprocess.Popen[str]") -> None:
    """Ends a server the hard way."""
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_a_killed_server_that_comes_back_loses_nothing(
    spawn: Spawn, tmp_path: Path, batch: Int8Array, caplog: pytest.LogCaptureFixture
) -> None:
    """Kill -9 in mid-batch: layers that came stay, batches in flight are answered with their own weights."""
    gate = tmp_path / "gate"
    child = spawn("--backend-option", f"gate={gate}")
    with connect(f"unix:{tmp_path}/child.sock", timeout_s=20) as npu:
        session = npu.compile(b"model", RANGES)
        session.push_weights({"bias": np.array(3, np.float32)})
        first = session.submit({"t0": batch}, range(LAYERS))
        session.push_weights({"bias": np.array(5, np.float32)})
        second = session.submit({"t0": batch}, range(LAYERS))
        before = first.tensor(0)  # layer 1 waits for the gate, so the batch is in the middle
        with caplog.at_level(logging.WARNING):
            kill(child)
            gate.touch()
            spawn()
            for pending, bias in ((first, 3), (second, 5)):
                for layer in range(LAYERS):
                    np.testing.assert_array_equal(expected(batch, layer, bias), pending.tensor(layer))
        assert first.tensor(0) is before
        assert "trying for 60 s" in caplog.text
        assert "2 unanswered batches are sent again" in caplog.text
        np.testing.assert_array_equal(expected(batch, 2, 5), session.submit({"t0": batch}, ()).tensor(2))


def test_a_server_that_stays_away_is_reported_and_can_be_started_later(
    spawn: Spawn, tmp_path: Path, batch: Int8Array
) -> None:
    """After ServerUnavailable the caller starts the server and repeats the step: the same tensor comes."""
    gate = tmp_path / "gate"
    child = spawn("--backend-option", f"gate={gate}")
    with connect(f"unix:{tmp_path}/child.sock", reconnect_timeout_s=1.0) as npu:
        session = npu.compile(b"model", RANGES)
        session.push_weights({"bias": np.array(3, np.float32)})
        pending = session.submit({"t0": batch}, ())
        kill(child)
        with pytest.raises(ServerUnavailable, match="start it again and repeat the step"):
            pending.tensor(2)
        spawn()
        np.testing.assert_array_equal(expected(batch, 2, 3), pending.tensor(2))
        np.testing.assert_array_equal(expected(batch, 2, 3), session.submit({"t0": batch}, ()).tensor(2))


def test_submitting_to_a_server_that_is_gone_reports_it_too(
    spawn: Spawn, tmp_path: Path, batch: Int8Array
) -> None:
    """Two attempts fail, the third finds the restarted server."""
    child = spawn()
    with connect(f"unix:{tmp_path}/child.sock", reconnect_timeout_s=1.0) as npu:
        session = npu.compile(b"model", RANGES)
        kill(child)
        pending = session.submit({"t0": batch}, ())
        for _ in range(2):
            with pytest.raises(ServerUnavailable):
                pending.tensor(2)
        spawn()
        np.testing.assert_array_equal(expected(batch, 2), pending.tensor(2))


def test_another_arithmetic_behind_the_endpoint_is_refused(
    spawn: Spawn, tmp_path: Path, batch: Int8Array
) -> None:
    """A server that comes back with another profile hash is not the NPU that training began with."""
    child = spawn()
    with connect(f"unix:{tmp_path}/child.sock") as npu:
        session = npu.compile(b"model", RANGES)
        kill(child)
        spawn("--backend-option", f"hash={'f' * 64}")
        with pytest.raises(DeviceChanged, match="profile hash ffffffffffff"):
            session.submit({"t0": batch}, ()).tensor(2)


def test_other_layers_after_a_restart_are_refused(spawn: Spawn, tmp_path: Path, batch: Int8Array) -> None:
    """The layer map must be the same, too."""
    child = spawn()
    with connect(f"unix:{tmp_path}/child.sock") as npu:
        session = npu.compile(b"model", RANGES)
        kill(child)
        spawn("--backend-option", "size=6")
        with pytest.raises(DeviceChanged, match="other layers or scales"):
            session.submit({"t0": batch}, ()).tensor(2)


def test_a_released_session_is_opened_again(npu: Connection, start: Start, batch: Int8Array) -> None:
    """SessionLost is no concern of the caller: weights and model are still here."""
    session = npu.compile(b"model", RANGES)
    session.push_weights({"bias": np.array(2, np.float32)})
    session.submit({"t0": batch}, ()).tensor(2)
    npu._transport.release(session._stream._session_id)  # what an expired lease does
    np.testing.assert_array_equal(expected(batch, 2, 2), session.submit({"t0": batch}, ()).tensor(2))


def test_a_silent_server_is_a_timeout(start: Start, backend: FakeBackend, batch: Int8Array) -> None:
    """The tensor can still be had once the device answers."""
    with connect(start().address, timeout_s=1.5) as npu:
        session = npu.compile(b"model", RANGES)
        backend.gate.clear()
        pending = session.submit({"t0": batch}, ())
        with pytest.raises(Timeout, match="sent nothing for"):
            pending.tensor(2)
        backend.gate.set()
        np.testing.assert_array_equal(expected(batch, 2), pending.tensor(2))


def test_a_device_fault_fails_its_batch_only(npu: Connection, backend: FakeBackend, batch: Int8Array) -> None:
    """The next batch runs with the same weights, and no detail of the fault leaves the server."""
    session = npu.compile(b"model", RANGES)
    session.push_weights({"bias": np.array(2, np.float32)})
    backend.fail_with = ZeroDivisionError("secret detail")
    pending = session.submit({"t0": batch}, ())
    with pytest.raises(DeviceFault, match="the server's log says why") as caught:
        pending.tensor(2)
    assert "secret" not in str(caught.value)
    backend.fail_with = None
    np.testing.assert_array_equal(expected(batch, 2, 2), session.submit({"t0": batch}, ()).tensor(2))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer": 1}, "layer 1, which was not tapped"),
        ({"layer": 9}, "layer 9, which was not tapped"),
        ({"data": np.zeros((5, 2, 4, 3), np.int8)}, r"promises int8 \(5, 2, 4, 4\)"),
        ({"data": np.zeros((5, 2, 4, 4), np.uint8)}, "with uint8"),
    ],
)
def test_a_backend_that_breaks_its_own_layer_map_is_caught(
    npu: Connection, backend: FakeBackend, batch: Int8Array, change: dict[str, object], reason: str
) -> None:
    """Another layer, shape or type than promised never reaches the trainer as a tensor."""
    session = npu.compile(b"model", RANGES)
    backend.spoil = lambda tensor: dataclasses.replace(tensor, **change)  # type: ignore[arg-type]
    with pytest.raises(DeviceFault, match=reason):
        session.submit({"t0": batch}, ()).tensor(2)
    backend.spoil = lambda tensor: tensor
    np.testing.assert_array_equal(expected(batch, 2), session.submit({"t0": batch}, ()).tensor(2))


def test_a_closed_session_says_so(npu: Connection, batch: Int8Array) -> None:
    """Using a session after close is an error with a remedy."""
    session = npu.compile(b"model", RANGES)
    session.close()
    session.close()
    with pytest.raises(SessionLost, match="compile the model again"):
        session.submit({"t0": batch}, ())


def test_nobody_at_the_endpoint(tmp_path: Path) -> None:
    """The message names the address and the command that starts a server."""
    with pytest.raises(ServerUnavailable, match=r"nothing\.sock.*npu-server serve"):
        connect(f"unix:{tmp_path}/nothing.sock", timeout_s=0.2)


def test_the_embedded_server_lives_and_dies_with_the_connection(plugin: None, batch: Int8Array) -> None:
    """It is started, started again after kill -9, and gone after close."""
    npu = connect(backend="fake")
    assert npu.embedded is not None
    session = npu.compile(b"model", RANGES)
    session.push_weights({"bias": np.array(4, np.float32)})
    np.testing.assert_array_equal(expected(batch, 2, 4), session.submit({"t0": batch}, ()).tensor(2))
    first = npu.embedded.pid
    os.kill(first, signal.SIGKILL)
    np.testing.assert_array_equal(expected(batch, 2, 4), session.submit({"t0": batch}, ()).tensor(2))
    second = npu.embedded.pid
    assert second != first
    npu.close()
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


def test_an_embedded_server_that_cannot_start_shows_its_log(plugin: None) -> None:
    """The reason that the child gave is in the message."""
    with pytest.raises(ServerUnavailable, match="unknown backend 'nonesuch'"):
        connect(backend="nonesuch")


def test_the_embedded_server_ends_with_its_parent(plugin: None) -> None:
    """A parent that is killed cannot clean up; its child sees standard input close and leaves."""
    code = (
        "from trainer_client import connect; import os; npu = connect(backend='fake'); "
        "print(npu.embedded.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    parent = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    assert parent.returncode == -signal.SIGKILL
    child = int(parent.stdout)
    try:
        descriptor = os.pidfd_open(child)
    except ProcessLookupError:
        return  # gone already
    ended, _, _ = select.select([descriptor], [], [], 20)
    os.close(descriptor)
    assert ended
