"""One ONNX node on arrays: whether it is evaluated, how large its result will be, and who computes it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from npu_wire.errors import InvalidModel, MissingPackage, UnsupportedModel
from npu_wire.layer_map import Array

MAX_ELEMENTS = 1 << 26
"""Largest constant, in elements."""

_MAX_INDICES = 1 << 18
"""Of an operator that the reference evaluator computes index by index."""

_ELEMENTWISE = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Neg",
        "Abs",
        "Sqrt",
        "Reciprocal",
        "Pow",
        "Exp",
        "Log",
        "Floor",
        "Ceil",
        "Min",
        "Max",
        "Equal",
        "Less",
        "Greater",
        "Where",
        "Not",
        "And",
        "Or",
        "Xor",
        "GreaterOrEqual",
        "LessOrEqual",
        "Mod",
        "Sign",
        "Round",
        "IsNaN",
        "IsInf",
        "Sin",
        "Cos",
        "Clip",
        "Sigmoid",
        "Tanh",
        "Softplus",
        "Relu",
    ]
)
_EVALUATED = _ELEMENTWISE | frozenset(
    [
        # ONNX Runtime 1.32 normalizes by other statistics than the batch's in training mode.
        "BatchNormalization",
        "Constant",
        "ConstantOfShape",
        "Shape",
        "Size",
        "Squeeze",
        "Unsqueeze",
        "Reshape",
        "Flatten",
        "Concat",
        "Expand",
        "Cast",
        "CastLike",
        "Identity",
        "Transpose",
        "Gather",
        "Slice",
        "Range",
        "Trilu",
        "CumSum",
        "Tile",
        "ReduceSum",
        "ReduceMean",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "MatMul",
        "NonZero",
        "GatherND",
        "ScatterND",
    ]
)
"""What NumPy computes, by ONNX's reference evaluator; ONNX Runtime does every other operator on constants."""

RANDOM = frozenset(
    [
        "Bernoulli",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    ]
)
"""Operators that yield something else each time."""

_NOT_FOLDED = RANDOM | frozenset(["SequenceAt", "Split", "SplitToSequence"])
"""What is random, and what has a handler of its own."""

Runner = Callable[[Mapping[str, Array]], Any]
"""Inputs of a node by name -> one of its outputs."""


def is_folded(node: NodeProto) -> bool:
    """Whether a node on constants is one: not what is random, nor what holds graphs of its own."""
    standard = node.domain in ("", "ai.onnx") and node.op_type not in _NOT_FOLDED
    return standard and all(a.type != onnx.AttributeProto.GRAPH for a in node.attribute)


def single_node_model(
    node: NodeProto, names: list[str], arrays: list[Array], output: str, opset: int
) -> onnx.ModelProto:
    """A model of one node, from its inputs by name to one of its outputs."""
    known = dict(zip(names, arrays, strict=True))
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in known.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(output)]
    # Where whole numbers stand, shapes may hang on them: shape inference wants their values.
    whole = [numpy_helper.from_array(a, n) for n, a in known.items() if a.dtype.kind == "i" and a.size <= 64]
    graph = helper.make_graph([node], "constant", inputs, outputs, whole)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def result_size(node: NodeProto, model: onnx.ModelProto, arrays: list[Array]) -> int:
    """Elements of a node's result, before it is computed.

    Args:
        node: the node.
        model: what `single_node_model` made of it.
        arrays: its inputs.

    Raises:
        InvalidModel: impossible shapes.
        UnsupportedModel: sparse constants, too many indices, or nobody knows.
    """
    return _check_size(node, arrays) if node.op_type in _EVALUATED else _inferred_size(node, model)


def runner(node: NodeProto, model: onnx.ModelProto) -> Runner:
    """What computes a node whose model `single_node_model` made.

    Raises:
        MissingPackage: it takes ONNX Runtime, which is not installed.
        Exception: whatever the evaluators raise.
    """
    return _reference(model) if node.op_type in _EVALUATED else _onnx_runtime(model)


def _reference(model: onnx.ModelProto) -> Runner:
    evaluator: Any = ReferenceEvaluator(model)
    return lambda feeds: evaluator.run(None, dict(feeds))[0]


def _onnx_runtime(model: onnx.ModelProto) -> Runner:
    try:
        import onnxruntime  # type: ignore[import-untyped]  # takes a while, and few models need it
    except ImportError as error:
        raise MissingPackage(
            "a constant of the model needs ONNX Runtime: pip install 'npu-in-the-loop[server]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda feeds: session.run(None, dict(feeds))[0]


def _inferred_size(node: NodeProto, model: onnx.ModelProto) -> int:
    """Elements of a node's result as ONNX's shape inference knows them, before it is computed.

    Raises:
        UnsupportedModel: it knows none.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise InvalidModel(
            f"node {node.name!r} ({node.op_type}) has impossible shapes: {str(error).splitlines()[0]}"
        ) from error
    dims = inferred.graph.output[0].type.tensor_type.shape.dim
    known = inferred.graph.output[0].type.tensor_type.HasField("shape")
    if not known or not all(dim.HasField("dim_value") for dim in dims):
        raise UnsupportedModel(f"node {node.name!r} ({node.op_type}): a constant whose size nobody can tell")
    return math.prod(dim.dim_value for dim in dims)


def _check_size(node: NodeProto, arrays: list[Array]) -> int:
    """Elements of a node's result, before it is computed.

    Raises:
        InvalidModel: impossible shapes.
        UnsupportedModel: sparse constants, or too many indices.
    """
    attributes = {a.name: a for a in node.attribute}
    if "sparse_value" in attributes:
        raise UnsupportedModel(f"node {node.name!r} ({node.op_type}): sparse constants are not supported")
    if node.op_type in ("GatherND", "ScatterND") and arrays[1].size > _MAX_INDICES:
        raise UnsupportedModel(
            f"node {node.name!r} ({node.op_type}): {arrays[1].size} indices; {_MAX_INDICES} at most"
        )
    size = max((a.size for a in arrays), default=0)
    try:
        if node.op_type in ("Shape", "Size"):
            size = arrays[0].ndim  # its input may be an activation, which takes no memory here
        elif node.op_type in _ELEMENTWISE:
            size = math.prod(np.broadcast_shapes(*(a.shape for a in arrays)))
        elif node.op_type == "Expand":
            size = math.prod(np.broadcast_shapes(arrays[0].shape, tuple(int(n) for n in arrays[1])))
        elif node.op_type == "ConstantOfShape":
            size = math.prod(int(n) for n in arrays[0])
        elif node.op_type == "Range":
            start, limit, delta = (float(a.reshape(-1)[0]) for a in arrays)
            size = int(abs((limit - start) / delta)) if delta else MAX_ELEMENTS + 1
        elif node.op_type == "Gather":
            axis = attributes["axis"].i if "axis" in attributes else 0
            size = arrays[1].size * (arrays[0].size // max(1, arrays[0].shape[axis]))
        elif node.op_type == "NonZero":
            size = arrays[0].ndim * arrays[0].size
        elif node.op_type == "Tile":
            size = arrays[0].size * math.prod(int(n) for n in arrays[1])
        elif node.op_type == "MatMul":
            size = (arrays[0].size // max(1, arrays[0].shape[-1])) * (
                arrays[1].size // max(1, arrays[1].shape[max(0, arrays[1].ndim - 2)])
            )
        elif node.op_type == "GatherND":
            rows, columns = arrays[1].shape[:-1], arrays[1].shape[-1]
            size = math.prod(rows) * math.prod(arrays[0].shape[columns:])
        elif node.op_type == "Concat":
            size = sum(a.size for a in arrays)
        elif node.op_type == "Constant":
            size = _constant_size(node)
    except (ValueError, IndexError, OverflowError) as error:
        raise InvalidModel(f"node {node.name!r} ({node.op_type}) has impossible shapes: {error}") from error
    return size


def _constant_size(node: NodeProto) -> int:
    return max((math.prod(a.t.dims) for a in node.attribute if a.HasField("t")), default=0)
