"""What the server computes from parameters before it quantizes: judged by ONNX Runtime, update by update."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import Backend, BackendOptions
from npu_wire.layer_map import Float32Array, LayerMap

BACKENDS = (ReferenceBackend, EmulatorBackend)
RNG = np.random.default_rng(3)


def numbers(*shape: int) -> Float32Array:
    """A float32 constant."""
    return RNG.normal(0, 1, shape).astype(np.float32)


def model(nodes: list, shape: tuple[int, ...], constants: dict[str, np.ndarray]) -> bytes:
    """A model from "x" to "y"."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *shape])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def exact(data: bytes, layer_map: LayerMap, codes: np.ndarray) -> np.ndarray:
    """ONNX Runtime's float result on what the codes stand for, in steps of the output's code."""
    entry, out = layer_map.inputs[0], layer_map.tensors[layer_map.outputs[0]]
    x = ((codes.astype(np.float64) - entry.zero_point) * entry.scale).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return np.clip(y / out.scale + out.zero_point, -128, 127)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["Clip", "Min"])
def test_a_trained_clipping_bound_follows_its_updates(backend: type[Backend], op: str) -> None:
    """PACT: where the bound falls, outputs are cut off lower; the layer map names it as a parameter."""
    inputs = ["x", "zero", "alpha"] if op == "Clip" else ["x", "alpha"]
    nodes = [helper.make_node(op, inputs, ["y"], "clip")]
    constants = {"zero": np.array(0, np.float32), "alpha": np.array(2.5, np.float32)}
    program = backend(BackendOptions(profile="tflm")).compile(
        model(nodes, (3, 5), constants), {"x": (-4.0, 4.0), "y": (-4.0, 2.5)}
    )
    layer = program.layer_map.layers[0]
    assert "alpha" in layer.parameters
    assert layer.saturation_high == 128  # the gradient of the bound comes from just there
    codes = np.arange(-128, 127, dtype=np.int8).reshape(17, 3, 5)
    for alpha in (2.5, 1.25):
        constants["alpha"] = np.array(alpha, np.float32)
        program.load_weights({"alpha": constants["alpha"]})
        (tensor,) = (t for t in program.forward(program.layer_map.named(codes), ()) if t is not None)
        expected = exact(model(nodes, (3, 5), constants), program.layer_map, codes)
        assert np.abs(tensor.data - expected).max() <= 0.5001
