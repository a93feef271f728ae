"""Sums in which one operand is spread, in the graph's own order of operands, before ONNX Runtime."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from npu_server.backends.reference import ReferenceBackend
from npu_server.conformance.targets import LocalTarget, run_all
from npu_server.seam import BackendOptions
from npu_wire.layer_map import Int8Array, TensorSpec

# What is averaged away of the operand that is spread; its channels.
SPREADS = {
    "a number an image": ((2, 3), 5),
    "a number a row": ((3,), 5),
    "a row": ((2,), 5),
    "a channel": ((), 1),
}


def network(axes: tuple[int, ...], channels: int, order: list[str]) -> bytes:
    """Y = a + b, of which b is spread over a."""
    nodes = [helper.make_node("Conv", ["x", "wa"], ["a"]), helper.make_node("Conv", ["x", "wb"], ["c"])]
    if axes:
        nodes.append(helper.make_node("ReduceMean", ["c", "axes"], ["b"]))
    else:
        nodes[1].output[0] = "b"
    rng = np.random.default_rng(4)
    arrays = {"wa": rng.normal(0, 0.5, (5, 5, 1, 1)), "wb": rng.normal(0, 0.5, (channels, 5, 1, 1))}
    constants = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Add", order, ["y"])],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5, 9, 7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5, 9, 7])],
        [*constants, numpy_helper.from_array(np.array(axes, np.int64), "axes")],
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def qlinear_add(operands: list[tuple[Int8Array, TensorSpec]], output: TensorSpec) -> Int8Array:
    """The sum by ONNX Runtime's integer operator."""
    names, constants, feeds = [], [], {}
    for name, spec in (("a", operands[0][1]), ("b", operands[1][1]), ("y", output)):
        constants.append(numpy_helper.from_array(np.array(spec.scale, np.float32), f"s_{name}"))
        constants.append(numpy_helper.from_array(np.array(spec.zero_point, np.int8), f"z_{name}"))
    for name, (codes, _) in zip("ab", operands, strict=True):
        names += [name, f"s_{name}", f"z_{name}"]
        feeds[name] = codes
    graph = helper.make_graph(
        [helper.make_node("QLinearAdd", [*names, "s_y", "z_y"], ["y"], domain="com.microsoft")],
        "sum",
        [helper.make_tensor_value_info(name, TensorProto.INT8, codes.shape) for name, codes in feeds.items()],
        [helper.make_tensor_value_info("y", TensorProto.INT8, None)],
        constants,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
@pytest.mark.parametrize("spread", SPREADS)
def test_a_spread_operand_on_either_side(spread: str, order: list[str]) -> None:
    """Scales of small integers make ties; 60 of them, 6 samples each."""
    model, rng = network(*SPREADS[spread], order), np.random.default_rng(1)
    target, compared = LocalTarget(ReferenceBackend(BackendOptions(profile="onnxruntime"))), 0
    for _ in range(60):
        scales = {name: float(rng.integers(4, 60)) / 256 for name in ("x", "a", "b", "c", "y")}
        scales["c"] = scales["b"]
        zero = {name: int(rng.integers(-128, 128)) for name in scales}
        ranges = {n: ((-128 - zero[n]) * s, (127 - zero[n]) * s) for n, s in scales.items()}
        session = target.compile(model, ranges)
        specs = {layer.name: layer.output for layer in session.layer_map.layers}
        batch = rng.integers(-128, 128, (6, 5, 9, 7)).astype(np.int8)
        codes = run_all(session, batch)
        expected = qlinear_add([(codes[name], specs[name]) for name in order], specs["y"])
        np.testing.assert_array_equal(codes["y"], expected)
        compared += expected.size
    assert compared == 60 * 6 * 5 * 9 * 7
