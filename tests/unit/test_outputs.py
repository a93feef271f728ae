"""What a program returns is the graph's output, wherever it stands; judged by ONNX Runtime's float result."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.shape_inference import infer_shapes
from own_profile import profile_with
from single_layers import BACKENDS

from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import BackendOptions
from npu_wire.errors import UnsupportedModel
from npu_wire.quantize import dequantize, quantize

RNG = np.random.default_rng(3)
CONSTANTS = {
    # The halves of what it yields have opposite signs and sizes, so that one is never taken for the other.
    "w": RNG.uniform(0.1, 0.5, (4, 6)).astype(np.float32) * np.float32([1, 1, 1, -3, -3, -3]),
    "w2": RNG.normal(0, 0.6, (6, 6)).astype(np.float32),
    "kernel": RNG.normal(0, 0.5, (6, 2, 3, 3)).astype(np.float32),
    "rows": np.array([[True], [True]]),
    "table": np.ones((2, 6), np.float32),
    "cube": np.ones((1, 1, 1), np.float32),
    "column": np.ones((6, 1), np.float32),
    "true": np.array(True),
    "false": np.array(False),
    "one": np.array(1.0, np.float32),
    "axis1": np.array([1]),
    "first": np.array(0),
    "to_image": np.array([0, 2, 2, 1]),
    "to_rows": np.array([0, -1]),
    "to_table": np.array([0, 3, 2]),
}
GEMM = ("Gemm", ["x", "w"], ["g"])
MORE = ("Gemm", ["g", "w2"], ["h"])
CONV = [("Reshape", ["x", "to_image"], ["i"]), ("Conv", ["i", "kernel"], ["c"], {"pads": [1, 1, 1, 1]})]

# What stands after the node that yields the output, or beside it, is what must not be returned.
GRAPHS = {
    "first of a split": [GEMM, ("Split", ["g"], ["y", "rest"], {"axis": 1, "num_outputs": 2})],
    "second of a split": [GEMM, ("Split", ["g"], ["rest", "y"], {"axis": 1, "num_outputs": 2})],
    "middle of a split": [GEMM, ("Split", ["g"], ["r", "y", "s"], {"axis": 1, "num_outputs": 3})],
    "relu of the first of a split": [
        GEMM,
        ("Split", ["g"], ["a", "b"], {"axis": 1, "num_outputs": 2}),
        ("Relu", ["a"], ["y"]),
    ],
    "first of a sequence": [
        GEMM,
        ("SplitToSequence", ["g"], ["s"], {"axis": 1}),
        ("SequenceAt", ["s", "first"], ["y"]),
    ],
    "true branch": [GEMM, MORE, ("Where", ["true", "g", "h"], ["y"])],
    "false branch": [GEMM, MORE, ("Where", ["false", "h", "g"], ["y"])],
    "true branch that is the later one": [GEMM, MORE, ("Where", ["true", "h", "g"], ["y"])],
    "consumed by later operators": [("Gemm", ["x", "w"], ["y"]), ("Gemm", ["y", "w2"], ["h"])],
    "consumed by an activation": [("Gemm", ["x", "w"], ["y"]), ("Relu", ["y"], ["h"])],
    "used twice": [("Gemm", ["x", "w"], ["y"]), ("Relu", ["y"], ["a"]), ("Add", ["y", "y"], ["b"])],
    "added to itself": [GEMM, ("Add", ["g", "g"], ["y"])],
    "before a node that it does not need": [GEMM, ("Relu", ["g"], ["y"]), MORE, ("Relu", ["h"], ["z"])],
    "after a node that it does not need": [GEMM, MORE, ("Sigmoid", ["g"], ["y"])],
    "a name for it": [GEMM, ("Identity", ["g"], ["y"]), MORE],
    "times one": [GEMM, MORE, ("Mul", ["g", "one"], ["y"])],
    "two names for it": [GEMM, ("Identity", ["g"], ["a"]), ("Identity", ["a"], ["y"]), MORE],
    "squeezed": [GEMM, ("Unsqueeze", ["g", "axis1"], ["a"]), ("Squeeze", ["a", "axis1"], ["y"]), MORE],
    "in another shape": [GEMM, ("Reshape", ["g", "to_table"], ["y"]), MORE],
    "transposed": [*CONV, ("Transpose", ["c"], ["y"], {"perm": [0, 2, 3, 1]}), ("Relu", ["c"], ["z"])],
    "flattened": [*CONV, ("Flatten", ["c"], ["y"]), ("Relu", ["c"], ["z"])],
    "flattened twice": [*CONV, ("Reshape", ["c", "to_rows"], ["a"]), ("Flatten", ["a"], ["y"])],
    "first of a split image": [*CONV, ("Split", ["c"], ["y", "z"], {"axis": 1, "num_outputs": 2})],
    "an image of the input": [("Reshape", ["x", "to_image"], ["y"]), GEMM],
}


def build(nodes: list) -> bytes:
    """A model with input "x" (batch, 4) and output "y"."""
    made = [
        helper.make_node(op, inputs, outputs, f"node_{i}", **(rest[0] if rest else {}))
        for i, (op, inputs, outputs, *rest) in enumerate(nodes)
    ]
    used = {name for node in made for name in node.input}
    graph = helper.make_graph(
        made,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in CONSTANTS.items() if name in used],
    )
    opsets = [helper.make_opsetid("", 20)]
    return infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10)).SerializeToString()


def in_float(model: bytes, x: np.ndarray) -> np.ndarray:
    """The graph's output by ONNX Runtime."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("title", GRAPHS)
def test_the_output_is_the_graphs(title: str, backend: type) -> None:
    """The last tensor that comes is the graph's output, in its shape and its values up to quantization."""
    model = build(GRAPHS[title])
    names = {name for _, _, outputs, *_ in GRAPHS[title] for name in outputs} | {"x"}
    program = backend(BackendOptions(profile="tflm")).compile(model, dict.fromkeys(names, (-16.0, 16.0)))
    entry, output = program.layer_map.inputs[0], program.layer_map.tensors[program.layer_map.outputs[0]]
    x = np.random.default_rng(5).uniform(-5, 5, (7, 4)).astype(np.float32)
    codes = quantize(x, entry.scale, entry.zero_point)
    expected = in_float(model, dequantize(codes, entry.scale, entry.zero_point))
    *_, last = program.forward(program.layer_map.named(codes), ())
    assert last.data.shape == expected.shape == (7, *output.shape)
    actual = dequantize(last.data, output.scale, output.zero_point)
    # Half an LSB where a layer rounds, a few where h derives from the rounded g.
    np.testing.assert_allclose(actual, np.clip(expected, -16, 16), atol=4 * output.scale)


BROADCAST = {
    # ONNX Runtime's result of each has a shape that the activation alone has not.
    "a condition of two rows": [GEMM, MORE, ("Where", ["rows", "g", "h"], ["y"])],
    "a branch of two rows": [GEMM, ("Where", ["true", "g", "table"], ["y"])],
    "a bound of three dimensions": [GEMM, ("Max", ["g", "cube"], ["y"])],
    "an exponent of three dimensions": [GEMM, ("Pow", ["g", "cube"], ["y"])],
    "a bias for each sample": [("Gemm", ["x", "w", "column"], ["y"])],
}


@pytest.mark.parametrize("title", BROADCAST)
def test_constants_that_would_change_the_shape_are_refused(title: str, tmp_path: Path) -> None:
    """Batches of 1 and of 6 fit ONNX's broadcasting; the answer would not be the activation's own shape."""
    options = BackendOptions(profile=profile_with(tmp_path, 'unsupported = "refuse"'))
    nodes = BROADCAST[title]
    model = build(nodes)
    batch = 6 if "sample" in title else 1
    assert in_float(model, np.ones((batch, 4), np.float32)).shape != (1, 6)
    with pytest.raises(UnsupportedModel, match=f"node 'node_{len(nodes) - 1}'"):
        ReferenceBackend(options).compile(model, dict.fromkeys("xghy", (-16.0, 16.0)))


NOT_COMPUTED = {
    "the input": [("Identity", ["x"], ["y"]), GEMM],
    "the input under other names": [("Identity", ["x"], ["a"]), ("Identity", ["a"], ["y"]), GEMM],
    "a constant": [("Identity", ["w"], ["y"]), GEMM],
    "a shape": [GEMM, ("Shape", ["g"], ["s"]), ("Cast", ["s"], ["y"], {"to": TensorProto.FLOAT})],
}


@pytest.mark.parametrize("title", NOT_COMPUTED)
def test_an_output_that_nothing_computes_is_refused(title: str) -> None:
    """There is no layer that could return it; the error names the output."""
    model = build(NOT_COMPUTED[title])
    assert in_float(model, np.zeros((2, 4), np.float32)) is not None
    with pytest.raises(UnsupportedModel, match="output 'y' is computed by no layer"):
        ReferenceBackend(BackendOptions(profile="tflm")).compile(model, {"x": (-1.0, 1.0), "g": (-1.0, 1.0)})
