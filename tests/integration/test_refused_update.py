"""A weight update that the NPU refuses: nothing of it is loaded, the session goes on at its old version."""

from collections.abc import Mapping

import numpy as np
import pytest
from fake_backend import Start
from onnx import TensorProto, helper, numpy_helper
from raw_client import Raw, attach, begin, weight

from npu_server.registry import create_backend
from npu_server.seam import BackendOptions
from npu_wire.layer_map import Float32Array, Int8Array
from npu_wire.tensors import OutgoingTensor, TensorAssembler
from npu_wire.v1 import npu_pb2

OPTIONS = BackendOptions(profile="tflm", threads=1)
RANGES = {"x": (-1.0, 1.0), "a": (-3.0, 3.0), "b": (-3.0, 3.0), "y": (-3.0, 3.0)}
GOOD = {
    "weight": np.full((4, 3, 1, 1), 0.25, np.float32),
    "gamma": np.ones(4, np.float32),
    "beta": np.zeros(4, np.float32),
    "mean": np.zeros(4, np.float32),
    "variance": np.full(4, 0.5, np.float32),
    "second": np.full((4, 4, 1, 1), 0.5, np.float32),
}
BETTER = {"second": np.full((4, 4, 1, 1), 0.25, np.float32), "beta": np.full(4, 0.5, np.float32)}
REFUSED = {
    "the folded weight becomes infinite": {"gamma": np.full(4, 3e38, np.float32), **BETTER},
    "the multiplier is out of range": {**BETTER, "weight": np.full((4, 3, 1, 1), 1e38, np.float32)},
    "a folded weight is the square root of -1": {**BETTER, "variance": np.full(4, -1, np.float32)},
}


def model() -> bytes:
    """Conv, BatchNormalization, Conv on (n, 3, 2, 2)."""
    nodes = [
        helper.make_node("Conv", ["x", "weight"], ["a"], "first"),
        helper.make_node("BatchNormalization", ["a", "gamma", "beta", "mean", "variance"], ["b"], "norm"),
        helper.make_node("Conv", ["b", "second"], ["y"], "last"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 2, 2])],
        [numpy_helper.from_array(value, name) for name, value in GOOD.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(proto.SerializeToString())


def update(version: int, tensors: Mapping[str, Float32Array]) -> list[npu_pb2.ForwardRequest]:
    """A whole weight update."""
    return [begin(version, *tensors), *(weight(version, name, array) for name, array in tensors.items())]


def batch(version: int, images: Int8Array) -> npu_pb2.ForwardRequest:
    """A batch that taps both layers."""
    request = npu_pb2.ForwardRequest()
    request.batch.batch_id, request.batch.weights_version = 1, version
    request.batch.taps.extend([0, 1])
    OutgoingTensor("x", images).write(request.batch.chunk, 0)
    return request


@pytest.mark.parametrize("name", ["reference", "emulator"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_update_leaves_weights_and_version_as_they_were(start: Start, name: str, case: str) -> None:
    """The old bits at the old version, then the next good update's; judged by programs that never saw it."""
    images = np.random.default_rng(5).integers(-128, 128, (3, 3, 2, 2), dtype=np.int8)
    judge = create_backend("reference", OPTIONS).compile(model(), RANGES)
    bits = [b"".join(t.data.tobytes() for t in judge.forward(judge.layer_map.named(images), (0, 1)))]
    judge.load_weights(BETTER)
    bits.append(b"".join(t.data.tobytes() for t in judge.forward(judge.layer_map.named(images), (0, 1))))
    assert bits[0] != bits[1]

    raw = Raw(start(create_backend(name, OPTIONS)).address)
    session_id = raw.compile(model(), RANGES)

    def run(version: int, *before: npu_pb2.ForwardRequest) -> bytes:
        answers = list(raw.stub.Forward(iter([attach(session_id), *before, batch(version, images)])))
        assert answers[-1].WhichOneof("kind") == "done"
        chunks = [answer.tensor.chunk for answer in answers if answer.HasField("tensor")]
        return b"".join(TensorAssembler(chunk, 1000).add(chunk).tobytes() for chunk in chunks)

    # A batch that waits behind the refused update is not computed with other weights than it names.
    call = raw.stub.Forward(iter([attach(session_id), *update(1, REFUSED[case]), batch(1, images)]))
    assert next(call).attached.weights_version == 0
    assert raw.error(call)[:2] in (
        ("INVALID_ARGUMENT", "NonFiniteInput"),
        ("INVALID_ARGUMENT", "InvalidInput"),
    )
    assert run(0) == bits[0]
    assert run(2, *update(2, BETTER)) == bits[1]
    raw.channel.close()
