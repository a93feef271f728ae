"""One-operator ONNX models, with the ranges and codes that they are tried with."""

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import infer_shapes

from npu_server.seam import Ranges
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Float32Array, Int8Array

OPSET = 20
IR_VERSION = 10
INPUT, OUTPUT = "x", "y"
OTHER_INPUT, SUM = "x2", "x_sum"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """A model that tries one operator.

    Attributes:
        op: the ONNX operator under test.
        title: what is special about it.
        nodes: from `INPUT` to `OUTPUT`; the node under test is named `node_name`.
        shape: of the input, without the batch.
        initializers: name -> array.
        domain: real numbers that the input covers.
        opset: version of the ONNX operators.
        output: shape of the output without the batch, where ONNX's shape inference does not know it.
    """

    op: str
    title: str
    nodes: tuple[NodeProto, ...]
    shape: tuple[int, ...]
    initializers: Mapping[str, Array] = field(default_factory=dict)
    domain: tuple[float, float] = (-4.0, 4.0)
    opset: int = OPSET
    output: tuple[int, ...] | None = None

    @property
    def node_name(self) -> str:
        """Name of the node under test, which a refusal must give."""
        return f"node_under_test_{self.op}"

    @property
    def needs(self) -> frozenset[str]:
        """The other operators in the model."""
        return frozenset(node.op_type for node in self.nodes) - {self.op, "Constant"}

    @property
    def seed(self) -> int:
        """Of everything random about it; the same in every run and on every machine."""
        return zlib.crc32(f"{self.op} {self.title}".encode())

    def model(self) -> bytes:
        """ONNX bytes."""
        graph = helper.make_graph(
            list(self.nodes),
            "case",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *self.shape])],
            [
                helper.make_tensor_value_info(
                    OUTPUT, TensorProto.FLOAT, self.output and ["batch", *self.output]
                )
            ],
            [numpy_helper.from_array(array, name) for name, array in self.initializers.items()],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        # The checker wants a shape of the output, and inference knows it from the nodes.
        return bytes(infer_shapes(model, strict_mode=True).SerializeToString())

    def weights(self) -> dict[str, Float32Array]:
        """The float initializers."""
        return {n: a for n, a in self.initializers.items() if a.dtype == np.float32 and a.ndim > 0}


def single(
    op: str,
    title: str,
    shape: tuple[int, ...],
    constants: tuple[tuple[int, ...] | Array | None, ...] = (),
    domain: tuple[float, float] = (-4.0, 4.0),
    opset: int = OPSET,
    output: tuple[int, ...] | None = None,
    **attributes: Any,
) -> Case:
    """A case of one node: the input, then constants.

    Args:
        op: ONNX operator.
        title: what is special about it.
        shape: of the input, without the batch.
        constants: the further inputs: a shape for random weights, an array, or None for one left out.
        domain: real numbers that the input covers.
        opset: version of the ONNX operators.
        output: shape of the output without the batch, where ONNX's shape inference does not know it.
        attributes: of the node.
    """
    rng = np.random.default_rng(zlib.crc32(f"{op} {title} weights".encode()))
    names, initializers = [INPUT], {}
    for i, constant in enumerate(constants):
        names.append("" if constant is None else f"c{i}")
        if constant is not None:
            initializers[f"c{i}"] = weights(rng, constant) if isinstance(constant, tuple) else constant
    node = helper.make_node(op, names, [OUTPUT], f"node_under_test_{op}", **attributes)
    return Case(op, title, (node,), shape, initializers, domain, opset, output)


def single_node_model(node: NodeProto, inputs: Mapping[str, Array], opset: int) -> bytes:
    """A model of one node, whose inputs all come from outside."""
    entries = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    exits = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "node", entries, exits)
    opsets = [helper.make_opsetid("", opset)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString())


def with_two_inputs(case: Case) -> bytes:
    """A case's model behind the sum of two inputs, which is an output as well."""
    model = onnx.load_model_from_string(case.model())
    graph = model.graph
    for node in graph.node:
        node.input[:] = [SUM if name == INPUT else name for name in node.input]
    graph.node.insert(0, helper.make_node("Add", [INPUT, OTHER_INPUT], [SUM], "sum_of_inputs"))
    shape: list[str | int | None] = ["batch", *case.shape]
    graph.input.append(helper.make_tensor_value_info(OTHER_INPUT, TensorProto.FLOAT, shape))
    graph.output.append(helper.make_tensor_value_info(SUM, TensorProto.FLOAT, shape))
    return bytes(model.SerializeToString())


def weights(rng: np.random.Generator, shape: tuple[int, ...]) -> Float32Array:
    """Random weights of about unit gain; now and then an outlier, as trained layers have them."""
    fan_in = max(1, math.prod(shape[1:]))
    values = rng.normal(0, 1 / math.sqrt(fan_in), shape)
    return np.where(rng.random(shape) < 0.02, 3 * values, values).astype(np.float32)


def float_values(model: bytes, x: Float32Array) -> dict[str, Float32Array]:
    """Every value of a float model by name, by ONNX's own reference evaluator."""
    found: Any = ReferenceEvaluator(model).run(None, {INPUT: x}, intermediate=True)
    return {name: np.asarray(value) for name, value in found.items() if name}


def range_variants(case: Case) -> Iterator[tuple[str, Ranges]]:
    """Activation ranges to compile a case with, float32 numbers as they travel.

    Yields:
        "calibrated": what the activations really cover; "tight": a third of it, so that they clip;
        "powers of two": scales that are powers of two, so that requantization meets ties.
    """
    rng = np.random.default_rng(case.seed)
    x = rng.uniform(*case.domain, (8, *case.shape)).astype(np.float32)
    spans = {
        name: (min(0.0, float(value.min())), max(1e-3, float(value.max())))
        for name, value in float_values(case.model(), x).items()
        if value.dtype == np.float32 and value.size and name not in case.initializers
    }
    spans[INPUT] = case.domain
    variants = {
        "calibrated": spans,
        "tight": {n: (low / 3, high / 3) if n != INPUT else (low, high) for n, (low, high) in spans.items()},
        "powers of two": {n: _power_of_two(low, high) for n, (low, high) in spans.items()},
    }
    for title, ranges in variants.items():
        yield title, {n: (float(np.float32(a)), float(np.float32(b))) for n, (a, b) in ranges.items()}


def _power_of_two(low: float, high: float) -> tuple[float, float]:
    scale = 2.0 ** math.ceil(math.log2((high - low) / (INT8_MAX - INT8_MIN)))
    zero_point = min(max(round(INT8_MIN - low / scale), INT8_MIN), INT8_MAX)
    return (INT8_MIN - zero_point) * scale, (INT8_MAX - zero_point) * scale


def codes(seed: int, shape: tuple[int, ...]) -> Int8Array:
    """A batch of six: three random, all smallest, all largest, and both in turn."""
    batch = np.random.default_rng(seed).integers(INT8_MIN, INT8_MAX + 1, (6, *shape)).astype(np.int8)
    batch[3], batch[4] = INT8_MIN, INT8_MAX
    batch[5] = np.where(np.arange(math.prod(shape)) % 2, INT8_MAX, INT8_MIN).reshape(shape)
    return batch
