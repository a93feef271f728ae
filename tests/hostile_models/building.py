"""Builders of small ONNX models, sound or not."""

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
RANGES = {name: (-1.0, 1.0) for name in ("x", "y", "a", "b", "c", "d")}
MIB = 2**20


def node(op: str, inputs: list[str], outputs: list[str], **attributes) -> NodeProto:
    """A node called "n"."""
    filled = {key: value for key, value in attributes.items() if not (isinstance(value, list) and not value)}
    made = helper.make_node(op, inputs, outputs, "n", **filled)
    for key in attributes.keys() - filled.keys():
        made.attribute.append(onnx.AttributeProto(name=key, type=onnx.AttributeProto.INTS))
    return made


def model(
    nodes: list[NodeProto], weights: dict | None = None, shape=("batch", 3, 8, 8), opset: int = 20
) -> ModelProto:
    """A model from "x" to "y"; weights are arrays or tensors."""
    tensors = [
        value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), name)
        for name, value in (weights or {}).items()
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info("y", FLOAT, ["batch", "others"])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def conv(**attributes) -> NodeProto:
    """A convolution of x with w."""
    return node("Conv", ["x", "w"], ["y"], **attributes)


def tensor(name: str, dims: list[int], data_type: int = FLOAT, raw: bytes = b"") -> TensorProto:
    """A tensor whose dimensions need not fit its bytes."""
    return TensorProto(name=name, dims=dims, data_type=data_type, raw_data=raw)


WEIGHT = np.ones((4, 3, 3, 3), np.float32)


def good() -> ModelProto:
    """A sound model."""
    nodes = [
        node("Conv", ["x", "w", "bias"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("GlobalAveragePool", ["b"], ["c"]),
        node("Flatten", ["c"], ["d"]),
        node("Gemm", ["d", "fc"], ["y"], transB=1),
    ]
    rng = np.random.default_rng(2)
    shapes = {"w": (4, 3, 3, 3), "bias": (4,), "fc": (5, 4)}
    weights = {name: rng.normal(0, 0.3, s).astype(np.float32) for name, s in shapes.items()}
    for i, each in enumerate(nodes):
        each.name = f"node{i}"
    return model(nodes, weights)
