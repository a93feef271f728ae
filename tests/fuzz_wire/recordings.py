"""Legal sessions as bytes, to be replayed in peace or in pieces, and the answers that they must get."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from npu_server.registry import create_backend
from npu_server.seam import BackendOptions, Ranges
from npu_wire.layer_map import Float32Array, Int8Array
from npu_wire.tensors import OutgoingTensor, split_bytes
from npu_wire.v1 import npu_pb2, program_pb2

PROFILE = "tflm"
_CHUNK_BYTES = 4096


@dataclass(frozen=True)
class Recording:
    """A session that any server of the profile answers in one way only.

    Attributes:
        model: ONNX bytes.
        ranges: of its activations.
        weights: what the update of `forward` loads.
        compile: serialized requests of Compile.
        forward: serialized requests of Forward after attach: an update of all weights, then two batches.
        layers: number of layers.
        expected: batch id and layer -> the output's codes, logical order, by `reference`.
    """

    model: bytes
    ranges: Ranges
    weights: Mapping[str, Float32Array]
    compile: tuple[bytes, ...]
    forward: tuple[bytes, ...]
    layers: int
    expected: Mapping[tuple[int, int], Int8Array]


def record_small() -> Recording:
    """Four layers of a few hundred bytes each."""
    return _record(channels=4, side=8, samples=3, seed=1)


def record_wide() -> Recording:
    """The same layers of up to 2 MiB each: more than a connection's buffers hold."""
    return _record(channels=16, side=64, samples=32, seed=2)


def compile_requests(model: bytes, ranges: Ranges) -> tuple[bytes, ...]:
    """Serialized requests of Compile."""
    header = npu_pb2.CompileHeader(
        model_bytes=len(model),
        ranges=[program_pb2.ActivationRange(name=n, min=low, max=high) for n, (low, high) in ranges.items()],
    )
    chunks = (npu_pb2.CompileRequest(model_chunk=data) for data in split_bytes(model, _CHUNK_BYTES))
    return tuple(m.SerializeToString() for m in (npu_pb2.CompileRequest(header=header), *chunks))


def attach(session_id: str) -> bytes:
    """A serialized first message of Forward."""
    return npu_pb2.ForwardRequest(attach=npu_pb2.Attach(session_id=session_id)).SerializeToString()


def batch_requests(
    name: str, batch: Int8Array, batch_id: int, version: int, taps: range, chunk_bytes: int = _CHUNK_BYTES
) -> list[bytes]:
    """Serialized chunks of a batch."""
    outgoing = OutgoingTensor(name, batch)
    requests = []
    for offset in outgoing.offsets(chunk_bytes):
        request = npu_pb2.ForwardRequest()
        request.batch.batch_id, request.batch.weights_version = batch_id, version
        if offset == 0:
            request.batch.taps.extend(taps)
        outgoing.write(request.batch.chunk, offset, chunk_bytes)
        requests.append(request.SerializeToString())
    return requests


def weight_requests(
    version: int, weights: Mapping[str, Float32Array], chunk_bytes: int = _CHUNK_BYTES
) -> list[bytes]:
    """An update's announcement and chunks, serialized."""
    requests = []
    for name, array in weights.items():
        outgoing = OutgoingTensor(name, array)
        for offset in outgoing.offsets(chunk_bytes):
            request = npu_pb2.ForwardRequest()
            request.weight.weights_version = version
            outgoing.write(request.weight.chunk, offset, chunk_bytes)
            requests.append(request.SerializeToString())
    begin = npu_pb2.ForwardRequest(update=npu_pb2.WeightUpdate(weights_version=version, names=weights))
    return [begin.SerializeToString(), *requests]


def _record(channels: int, side: int, samples: int, seed: int) -> Recording:
    rng = np.random.default_rng(seed)
    shapes = {
        "w1": (channels, 3, 3, 3),
        "b1": (channels,),
        "w2": (channels, channels, 1, 1),
        "fc": (5, channels),
    }
    weights, others = (
        {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(2)
    )
    model = _model(weights, side).SerializeToString()
    ranges: Ranges = {name: (-4.0, 4.0) for name in ("x", "a", "b", "c", "d", "e", "f", "y")}
    codes = [rng.integers(-128, 128, (samples, 3, side, side), dtype=np.int8) for _ in range(2)]
    backend = create_backend("reference", BackendOptions(profile=PROFILE, threads=1))
    backend.open()
    program = backend.compile(model, ranges)
    name, layers = program.layer_map.inputs[0].name, len(program.layer_map.layers)
    program.load_weights(others)
    forward = weight_requests(1, others)
    expected: dict[tuple[int, int], Int8Array] = {}
    for batch_id, batch in enumerate(codes, 1):
        forward += batch_requests(name, batch, batch_id, 1, range(layers), 2**18)
        for tensor in filter(None, program.forward(program.layer_map.named(batch), range(layers))):
            expected[batch_id, tensor.layer] = np.ascontiguousarray(tensor.data)
    program.close()
    backend.close()
    return Recording(model, ranges, others, compile_requests(model, ranges), tuple(forward), layers, expected)


def _model(weights: Mapping[str, Float32Array], side: int) -> onnx.ModelProto:
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "w1", "b1"], ["a"], "conv1", pads=[1, 1, 1, 1]),
        make("Relu", ["a"], ["b"], "relu"),
        make("Conv", ["b", "w2"], ["c"], "conv2"),
        make("Add", ["b", "c"], ["d"], "add"),
        make("GlobalAveragePool", ["d"], ["e"], "pool"),
        make("Flatten", ["e"], ["f"], "flatten"),
        make("Gemm", ["f", "fc"], ["y"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "recorded",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
