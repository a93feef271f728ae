"""Programs with several inputs, some of them raw, and several outputs, over a real socket."""

import time
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import pytest
from fake_backend import FakeBackend, FakeProgram, Start, expected
from raw_client import Raw, attach, input_chunk

from npu_server.seam import BackendOptions, LayerTensor, Program, Ranges
from npu_wire.errors import InvalidInput
from npu_wire.layer_map import Array, LayerMap, RawSpec
from npu_wire.tensors import OutgoingTensor
from npu_wire.v1 import npu_pb2
from trainer_client.npu.connection import connect

IDS, MASK = RawSpec("ids", (5,), np.dtype(np.int64)), RawSpec("mask", (2, 4), np.dtype(np.bool_), False)


class ManyBackend(FakeBackend):
    """Compiles to `ManyProgram`."""

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        super().compile(model, ranges)
        return ManyProgram(self)


class ManyProgram(FakeProgram):
    """Adds the first id of a sample where the mask's first value says so; is for its first and last layer."""

    @property
    def layer_map(self) -> LayerMap:
        inner = super().layer_map
        return LayerMap((MASK, *inner.inputs, IDS), inner.layers, ("t1", "t3"))

    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        added = inputs["ids"][:, 0].reshape(-1, 1, 1, 1) * inputs["mask"][0, 0]
        start = (inputs["t0"].astype(np.int64) + added).astype(np.int8)
        for layer in range(3):
            now = time.monotonic_ns()
            wanted = layer in self.layer_map.output_layers.union(taps)
            yield LayerTensor(layer, expected(start, layer), now, now) if wanted else None


def feeds(batch: Array, mask: bool = True) -> dict[str, Array]:
    """Inputs whose ids are the samples' numbers, far beyond 32 bits in what nobody reads."""
    ids = np.full((len(batch), 5), 2**40, np.int64)
    ids[:, 0] = np.arange(len(batch))
    return {"t0": batch, "ids": ids, "mask": np.full((2, 4), mask)}


def test_raw_inputs_and_all_outputs_arrive(start: Start, batch: Array) -> None:
    """Integers and booleans as they are, without a batch dimension too; both outputs come untapped."""
    with connect(start(ManyBackend(BackendOptions())).address) as npu:
        session = npu.compile(b"model", {"t0": (-1.0, 1.0)})
        assert session.layer_map.inputs[0] == MASK
        assert session.layer_map.inputs[2] == IDS
        for mask in (True, False):
            pending = session.submit(feeds(batch, mask), ())
            moved = (batch + mask * np.arange(len(batch)).reshape(-1, 1, 1, 1)).astype(np.int8)
            for layer in (0, 2):
                np.testing.assert_array_equal(expected(moved, layer), pending.tensor(layer))
            with pytest.raises(InvalidInput, match="layer 1 was not tapped"):
                pending.tensor(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros((1, 5), np.int64)}, "'ids' is int64 of shape \\(1, 5\\)"),
        ({"ids": np.zeros((6, 5), np.int32)}, "must be int64"),
        ({"mask": np.zeros((6, 2, 4), np.bool_)}, "'mask' is bool of shape"),
        ({"extra": np.zeros((6, 5), np.int64)}, "due are"),
    ],
)
def test_other_inputs_than_due_are_refused(
    start: Start, batch: Array, change: dict[str, Array], message: str
) -> None:
    """Before anything is sent; the session goes on."""
    with connect(start(ManyBackend(BackendOptions())).address) as npu:
        session = npu.compile(b"model", {"t0": (-1.0, 1.0)})
        with pytest.raises(InvalidInput, match=message):
            session.submit({**feeds(batch[:6]), **change}, ())
        assert session.submit(feeds(batch), ()).tensor(0).shape == batch.shape


def chunk(name: str, array: Array) -> npu_pb2.ForwardRequest:
    """A whole input of batch 1."""
    request = npu_pb2.ForwardRequest()
    request.batch.batch_id = 1
    OutgoingTensor(name, array).write(request.batch.chunk, 0)
    return request


def test_inputs_that_break_the_protocol_are_the_clients_error(start: Start) -> None:
    """Another order, another number of samples, something in between, a boolean that is none."""
    raw = Raw(start(ManyBackend(BackendOptions())).address)
    mask, codes = chunk("mask", np.ones((2, 4), np.bool_)), input_chunk()
    two = chunk("ids", np.zeros((2, 5), np.int64))
    no_boolean = chunk("mask", np.ones((2, 4), np.bool_))
    no_boolean.batch.chunk.data = b"\x02" * 8
    update = npu_pb2.ForwardRequest(update=npu_pb2.WeightUpdate(weights_version=1))
    for messages, text in (
        ([codes], "expected 'mask'"),
        ([mask, codes, two], "expected 'ids'"),
        ([mask, update], "in the middle of batch 1"),
        ([no_boolean], "a boolean is one byte, 0 or 1"),
    ):
        session_id = raw.compile()
        status, kind, details = raw.error(raw.stub.Forward(iter([attach(session_id), *messages])))
        assert kind == "InvalidInput", (status, details)
        assert text in details
    raw.close()
