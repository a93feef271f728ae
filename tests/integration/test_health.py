"""Health follows the device for as long as the server serves."""

import json
import urllib.error
import urllib.request

import pytest
from fake_backend import FakeBackend, Start, wait_until
from test_shutdown import serves

from npu_server.app import RunningServer
from npu_server.seam import BackendOptions, Health
from npu_wire.errors import DeviceFault
from npu_wire.layer_map import Int8Array
from trainer_client.npu.connection import connect

RANGES = {"t0": (-1.0, 1.0)}


def page(server: RunningServer, path: str) -> tuple[int, dict[str, object]]:
    """Status and content of a page."""
    try:
        with urllib.request.urlopen(f"http://{server.http_address}{path}", timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_health_follows_the_device(start: Start, backend: FakeBackend, batch: Int8Array) -> None:
    """Not serving while a probe fails, with its words on the status page; serving when it recovers."""
    server = start(http="127.0.0.1:0", probe_s=0.3)
    assert serves(server.address)
    backend.health = Health(False, "too hot; cool it")
    wait_until(lambda: not serves(server.address))
    assert page(server, "/healthz")[0] == 503
    device = page(server, "/api/v1/status")[1]["device"]
    assert isinstance(device, dict)
    assert (device["serving"], device["trouble"]) == (False, "too hot; cool it")
    backend.health = Health(True)
    wait_until(lambda: serves(server.address))
    assert page(server, "/healthz")[0] == 200
    with connect(server.address) as npu:
        npu.compile(b"model", RANGES).submit({"t0": batch}, ()).tensor(2)
    assert len(backend.threads) == 1


@pytest.mark.parametrize("error", [DeviceFault("no answer from the board"), ZeroDivisionError()])
def test_a_fault_has_the_device_probed_at_once(
    start: Start, backend: FakeBackend, batch: Int8Array, error: Exception
) -> None:
    """Long before the next probe is due."""
    server = start(probe_s=100_000)
    backend.health = Health(False, "gone")
    backend.fail_with = error
    with connect(server.address, reconnect_timeout_s=0.1) as npu:
        assert serves(server.address)
        with pytest.raises(DeviceFault):
            npu.compile(b"model", RANGES).submit({"t0": batch}, ()).tensor(2)
        wait_until(lambda: not serves(server.address))


def test_a_device_that_hangs_does_not_serve(start: Start, backend: FakeBackend, batch: Int8Array) -> None:
    """A probe that waits for four intervals has failed, until it is answered."""
    server = start(probe_s=0.1)
    backend.gate.clear()
    with connect(server.address) as npu:
        pending = npu.compile(b"model", RANGES).submit({"t0": batch}, ())
        wait_until(lambda: not serves(server.address))
        assert "not answered" in server.status().device.trouble
        backend.gate.set()
        pending.tensor(2)
        wait_until(lambda: serves(server.address))


class RaisingProbe(FakeBackend):
    """Raises from the second probe on."""

    probes = 0

    def probe(self) -> Health:
        self.probes += 1
        if self.probes > 1:
            raise OSError("cable")
        return Health(True)


def test_a_probe_that_raises_has_failed(start: Start) -> None:
    """Although the seam forbids it."""
    server = start(RaisingProbe(BackendOptions()), probe_s=0.3)
    wait_until(lambda: not serves(server.address))
    assert "cable" in server.status().device.trouble
