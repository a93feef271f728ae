"""Which operation is blamed for a failure, so that the others go on."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from embedded_backends import DEADLY_CODE, diary
from fake_backend import FakeBackend, Spawn, expected
from test_recovery import RANGES, kill

from npu_wire.device import Capabilities, Fingerprint
from npu_wire.errors import DeviceFault, InvalidInput
from npu_wire.layer_map import (
    Float32Array,
    Int8Array,
    LayerSpec,
    TensorSpec,
    input_spec_to_proto,
    layer_spec_to_proto,
)
from npu_wire.v1 import npu_pb2
from trainer_client.npu.connection import Connection, connect
from trainer_client.npu.stream import RemoteSession
from trainer_client.npu.transport import Description, Patience

OTHER = {"big": np.zeros((3, 1000, 1000), np.float32)}


def bias(value: float) -> dict[str, Float32Array]:
    """An update of the fake device."""
    return {"bias": np.array(value, np.float32)}


def test_a_refused_update_fails_its_batches_and_the_next_one_goes_on(
    npu: Connection, backend: FakeBackend, batch: Int8Array
) -> None:
    """The reason comes with the batch, nothing is loaded or compiled again, a repaired update works."""
    session = npu.compile(b"model", RANGES)
    session.push_weights(bias(2))
    np.testing.assert_array_equal(expected(batch, 2, 2), session.submit({"t0": batch}, ()).tensor(2))
    session.push_weights(OTHER | bias(1000))
    for _ in range(2):  # as long as the weights are not repaired
        with pytest.raises(InvalidInput, match="weights version 2 is not loaded: the bias is out of range"):
            session.submit({"t0": batch}, ()).tensor(2)
    session.push_weights(bias(3))
    np.testing.assert_array_equal(expected(batch, 2, 3), session.submit({"t0": batch}, ()).tensor(2))
    assert backend.calls.count("compile") == 1


def test_what_was_made_on_top_of_a_refused_update_fails_too(
    npu: Connection, backend: FakeBackend, batch: Int8Array
) -> None:
    """Of three updates in a row the second is refused: the third would not be what it was made as."""
    session = npu.compile(b"model", RANGES)
    backend.gate.clear()
    first = session.submit({"t0": batch}, ())
    session.push_weights(bias(2))
    second = session.submit({"t0": batch}, ())
    session.push_weights(bias(1000))
    session.push_weights(bias(4))
    third = session.submit({"t0": batch}, ())
    backend.gate.set()
    np.testing.assert_array_equal(expected(batch, 2), first.tensor(2))
    np.testing.assert_array_equal(expected(batch, 2, 2), second.tensor(2))
    with pytest.raises(InvalidInput, match="weights version 2 is not loaded"):
        third.tensor(2)
    session.push_weights(OTHER)
    np.testing.assert_array_equal(expected(batch, 2, 2), session.submit({"t0": batch}, ()).tensor(2))


def test_an_update_is_not_taken_while_nobody_knows_of_the_refused_one(
    npu: Connection, backend: FakeBackend, batch: Int8Array
) -> None:
    """The caller believes that it adds to values which the NPU does not have."""
    session = npu.compile(b"model", RANGES)
    session.push_weights(bias(1000))
    refused = session.submit({"t0": batch}, ())
    with session._stream._changed:
        session._stream._changed.wait_for(lambda: refused._batch.error is not None, 20)
    with pytest.raises(InvalidInput, match="weights version 1 is not loaded"):
        session.push_weights(bias(4))
    session.push_weights(bias(5))
    np.testing.assert_array_equal(expected(batch, 2, 5), session.submit({"t0": batch}, ()).tensor(2))


def test_a_refused_update_is_not_replayed(spawn: Spawn, tmp_path: Any, batch: Int8Array) -> None:
    """A new server gets what was loaded, and nothing of what was refused."""
    child = spawn()
    with connect(f"unix:{tmp_path}/child.sock", timeout_s=20) as npu:
        session = npu.compile(b"model", RANGES)
        session.push_weights(bias(2))
        session.submit({"t0": batch}, ()).tensor(2)
        session.push_weights(OTHER | bias(1000))
        with pytest.raises(InvalidInput, match="bias is out of range"):
            session.submit({"t0": batch}, ()).tensor(2)
        kill(child)
        spawn()
        session.push_weights(OTHER)
        np.testing.assert_array_equal(expected(batch, 2, 2), session.submit({"t0": batch}, ()).tensor(2))


@pytest.mark.timeout(90)
def test_a_batch_that_kills_the_server_is_given_up(plugin: None, batch: Int8Array) -> None:
    """Two servers die of it; the error names it, its neighbour is answered, and no third one dies."""
    deadly = batch.copy()
    deadly.flat[0] = DEADLY_CODE
    batch.flat[0] = 0
    with connect(backend="deadly") as npu:
        session = npu.compile(b"model", RANGES)
        session.push_weights(bias(3))
        session.submit({"t0": batch}, ()).tensor(2)
        fatal, neighbour = session.submit({"t0": deadly}, ()), session.submit({"t0": batch}, ())
        with pytest.raises(
            DeviceFault, match=r"batch 2 of session \w{8} at unix:\S+ has cost 2 servers.*server's log"
        ):
            fatal.tensor(2)
        for answered in (neighbour, session.submit({"t0": batch}, ())):
            np.testing.assert_array_equal(expected(batch, 2, 3), answered.tensor(2))
    assert diary().count("died") == 2


class HangsUp:
    """A transport to a server that ends every stream at once; counts what it compiles."""

    address = "nowhere:1"
    local = False

    def __init__(self) -> None:
        self.compiled = 0
        self.often = threading.Event()

    def describe(self, timeout_s: float, wait_for_ready: bool) -> Description:
        return Description(Capabilities(Fingerprint("", "", "", "", "", "hash"), (), 64), 4, 2**20, 0)

    def compile(self, model: bytes, ranges: object, timeout_s: float) -> npu_pb2.CompileResponse:
        self.compiled += 1
        if self.compiled == 10:
            self.often.set()
        spec = TensorSpec("t0", (1,), 1.0, 0)
        layer = layer_spec_to_proto(LayerSpec(TensorSpec("t1", (1,), 1.0, 0), "Add", ("t0",)))
        return npu_pb2.CompileResponse(
            session_id="s", inputs=[input_spec_to_proto(spec)], layers=[layer], outputs=["t1"]
        )

    def forward(self, requests: Iterator[object]) -> "HangsUp":
        return self

    def __iter__(self) -> Iterator[npu_pb2.ForwardResponse]:
        return iter(())

    def cancel(self) -> None:
        pass

    def release(self, session_id: str) -> None:
        pass


@pytest.mark.timeout(60)
def test_a_server_that_ends_every_stream_is_not_asked_for_ever() -> None:
    """An idle session lets it be after two streams; a batch then tries twice more and says what happened."""
    transport: Any = HangsUp()
    session = RemoteSession(transport, lambda: None, "hash", b"model", RANGES, Patience(5, 5, 5))
    assert not transport.often.wait(1)
    with pytest.raises(DeviceFault, match=r"batch 1 of session s .*ended the stream"):
        session.submit({"t0": np.zeros((1, 1), np.int8)}, ()).tensor(0)
    assert transport.compiled < 10
    session.close()
