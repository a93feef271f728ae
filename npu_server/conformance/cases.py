"""What is tried: for every ONNX operator that an NPU may declare, one or more small models.

The table goes beyond what our own compiler knows: what a backend does not declare must be refused, and these
models are what it is asked to refuse.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from npu_server.conformance.graphs import INPUT, OUTPUT, Array, Case, single, weights

_IMAGE = (6, 9, 8)
_SEQUENCE = (5, 12)


def all_cases() -> Mapping[str, tuple[Case, ...]]:
    """ONNX operator -> its cases."""
    found: dict[str, list[Case]] = {}
    for case in chain(
        _weighted(),
        _norms(),
        _pairs(),
        _constant_operands(),
        _functions(),
        _pools(),
        _movements(),
        _reductions(),
    ):
        found.setdefault(case.op, []).append(case)
    return {op: tuple(found[op]) for op in sorted(found)}


def probe_candidates() -> tuple[Case, ...]:
    """Models with weights, best first; the checks of the contract use the first that a backend can run."""
    rng = np.random.default_rng(11)
    shapes = {"conv.weight": (6, 3, 3, 3), "conv.bias": (6,), "fc.weight": (5, 6 * 3 * 3), "fc.bias": (5,)}
    initializers: dict[str, Array] = {name: weights(rng, shape) for name, shape in shapes.items()}
    net = Case(
        "Conv",
        "small network",
        (
            helper.make_node(
                "Conv", [INPUT, "conv.weight", "conv.bias"], ["a"], "conv", strides=[3, 3], pads=[1, 1, 1, 1]
            ),
            helper.make_node("Relu", ["a"], ["r"], "relu"),
            helper.make_node("Flatten", ["r"], ["f"], "flatten"),
            helper.make_node("Gemm", ["f", "fc.weight", "fc.bias"], [OUTPUT], "fc", transB=1),
        ),
        (3, 8, 8),
        initializers,
    )
    return (
        net,
        single("Conv", "probe", (3, 8, 8), ((6, 3, 3, 3), (6,)), pads=[1, 1, 1, 1]),
        single("Gemm", "probe", (24,), ((10, 24), (10,)), transB=1),
        single("MatMul", "probe", (24,), ((24, 10),)),
    )


def _weighted() -> Iterator[Case]:
    yield single("Conv", "3x3", _IMAGE, ((8, 6, 3, 3), (8,)), pads=[1, 1, 1, 1])
    yield single("Conv", "no bias, valid", _IMAGE, ((5, 6, 3, 3),))
    yield single(
        "Conv", "strides and uneven pads", _IMAGE, ((8, 6, 3, 2), (8,)), strides=[2, 1], pads=[0, 1, 2, 0]
    )
    yield single("Conv", "dilated", _IMAGE, ((4, 6, 3, 3), (4,)), dilations=[2, 1], pads=[2, 1, 2, 1])
    yield single("Conv", "pointwise", _IMAGE, ((16, 6, 1, 1), (16,)))
    yield single("Conv", "depthwise", _IMAGE, ((6, 1, 3, 3), (6,)), group=6, pads=[1, 1, 1, 1])
    yield single("Conv", "depthwise, multiplier 2", _IMAGE, ((12, 1, 3, 3), (12,)), group=6, strides=[2, 2])
    yield single("Conv", "grouped", _IMAGE, ((4, 3, 5, 5), (4,)), group=2, pads=[2, 2, 2, 2])
    yield single("Conv", "same padding", _IMAGE, ((4, 6, 3, 3),), strides=[2, 2], auto_pad="SAME_UPPER")
    yield single("ConvTranspose", "2x2, stride 2", (6, 5, 4), ((6, 4, 2, 2), (4,)), strides=[2, 2])
    yield single(
        "ConvTranspose",
        "3x3, overlapping",
        (6, 5, 4),
        ((6, 4, 3, 3), (4,)),
        strides=[2, 2],
        pads=[1, 1, 1, 1],
    )
    yield single("Conv", "one dimension", (6, 20), ((8, 6, 3), (8,)), pads=[1, 1], strides=[2])
    yield single(
        "ConvTranspose",
        "output padding",
        (6, 5, 4),
        ((6, 4, 3, 3), (4,)),
        output_padding=[1, 1],
        strides=[2, 2],
        pads=[1, 1, 1, 1],
    )
    yield single("Gemm", "transposed weight", (24,), ((10, 24), (10,)), transB=1)
    yield single("Gemm", "plain, no bias", (24,), ((24, 10),))
    yield single("Gemm", "alpha and beta", (24,), ((10, 24), (10,)), transB=1, alpha=0.5, beta=2.0)
    yield single("MatMul", "matrix", (24,), ((24, 10),))
    yield single("MatMul", "sequence", _SEQUENCE, ((12, 7),))
    yield single("MatMul", "a matrix a head", (2, 5, 12), ((2, 12, 7),))
    left = (helper.make_node("MatMul", ["matrix", INPUT], [OUTPUT], "node_under_test_MatMul"),)
    matrix: dict[str, Array] = {"matrix": weights(np.random.default_rng(3), (4, 5))}
    yield Case("MatMul", "matrix on the left", left, _SEQUENCE, matrix)
    yield single(
        "PRelu", "slope a channel", _IMAGE, (np.linspace(-0.2, 0.4, 6).astype(np.float32).reshape(6, 1, 1),)
    )


def _norms() -> Iterator[Case]:
    ends = ((0.5, 1.5), (-1.0, 1.0), (-0.5, 0.5), (0.5, 2.0))
    scale, shift, mean, variance = (np.linspace(*pair, 6).astype(np.float32) for pair in ends)
    yield single("BatchNormalization", "image", _IMAGE, (scale, shift, mean, variance))
    yield single("InstanceNormalization", "image", _IMAGE, (scale, shift))
    yield single("GroupNormalization", "image", _IMAGE, (scale, shift), opset=21, output=_IMAGE, num_groups=2)
    yield single("LayerNormalization", "last axis", _SEQUENCE, ((12,), (12,)), axis=-1)
    yield single("RMSNormalization", "last axis", _SEQUENCE, ((12,),), opset=23, axis=-1)


def _pairs() -> Iterator[Case]:
    """Operators on two activations; both come from convolutions, so that their codes go everywhere."""
    for op in ("Add", "Mul", "Sub"):
        yield _pair(op, "two activations", 6)
    yield _pair("Div", "two activations", 6)
    yield _pair("Add", "broadcast", 1)
    yield _pair("Mul", "broadcast", 1)
    yield _pair("Concat", "channels", 3, axis=1)
    yield _pair("Concat", "height", 6, axis=2)
    yield _pair("Max", "two activations", 6)
    yield _pair("Max", "broadcast", 1)
    yield _pair("Min", "two activations", 6)
    yield _pair("MatMul", "two activations", 6, square=True)


def _pair(op: str, title: str, channels: int, square: bool = False, **attributes: Any) -> Case:
    rng = np.random.default_rng(len(op) + channels)
    initializers: dict[str, Array] = {
        "a.weight": weights(rng, (6, 6, 1, 1)),
        "b.weight": (2 * weights(rng, (channels, 6, 1, 1))).astype(np.float32),
    }
    nodes: list[NodeProto] = [
        helper.make_node("Conv", [INPUT, "a.weight"], ["a"], "conv_a"),
        helper.make_node("Conv", [INPUT, "b.weight"], ["b"], "conv_b"),
        helper.make_node(op, ["a", "b"], [OUTPUT], f"node_under_test_{op}", **attributes),
    ]
    return Case(op, title, tuple(nodes), (6, 7, 7) if square else _IMAGE, initializers)


def _constant_operands() -> Iterator[Case]:
    one = np.array(1.7, np.float32)
    channels = np.linspace(-1.5, 2.0, 6).astype(np.float32).reshape(1, 6, 1, 1)
    for op in ("Add", "Sub", "Mul"):
        yield single(op, "one number", _IMAGE, (one,))
        yield single(op, "one number a channel", _IMAGE, (channels,))
    yield single("Div", "one number", _IMAGE, (one,))
    two = helper.make_node("Constant", [], ["k"], value_float=2.0)
    square = helper.make_node("Pow", [INPUT, "k"], [OUTPUT], "node_under_test_Pow")
    yield Case("Pow", "square", (two, square), _IMAGE)
    rows = np.linspace(-1.0, 1.0, 9).astype(np.float32).reshape(1, 1, 9, 1)
    for op in ("Add", "Mul"):
        yield single(op, "one number a row", _IMAGE, (rows,))
        yield single(op, "stretched to rows", (6, 1, 8), (rows,))
    yield single("Max", "one number a row", _IMAGE, (rows,))


def _functions() -> Iterator[Case]:
    for op in (
        "Relu",
        "Sigmoid",
        "Tanh",
        "HardSwish",
        "Gelu",
        "Softplus",
        "Elu",
        "Mish",
        "Erf",
        "Exp",
        "Abs",
    ):
        yield single(op, "image", _IMAGE)
    for op in ("Neg", "Softsign", "Selu", "Sin", "Floor", "Round", "Sign", "ThresholdedRelu", "Cos"):
        yield single(op, "image", _IMAGE)
    yield single("Sqrt", "image", _IMAGE, domain=(0.0, 4.0))
    yield single("HardSigmoid", "default slope", _IMAGE)
    yield single("HardSigmoid", "of hard swish", _IMAGE, alpha=1 / 6, beta=0.5)
    yield single("LeakyRelu", "slope 0.1", _IMAGE, alpha=0.1)
    yield single("Clip", "to [0, 6]", _IMAGE, _bounds(0.0, 6.0), domain=(-2.0, 8.0))
    yield single("Clip", "to [-1, 1]", _IMAGE, _bounds(-1.0, 1.0))
    yield single("Max", "with a constant", _IMAGE, _bounds(-0.5))
    yield single("Min", "with a constant", _IMAGE, _bounds(2.5))
    for op in ("Softmax", "LogSoftmax"):
        yield single(op, "last axis", _SEQUENCE, axis=-1)
    yield single("Celu", "alpha 0.7", _IMAGE, alpha=0.7)
    yield single("Log", "image", _IMAGE, domain=(0.0, 4.0))
    yield single("Reciprocal", "image", _IMAGE, domain=(0.5, 4.0))
    yield from _vanishing()
    yield from _choices()


def _vanishing() -> Iterator[Case]:
    """What vanishes in compilation, and so is tried in front of something that does not."""
    behind = helper.make_node("Relu", ["a"], [OUTPUT], "relu")
    ahead = {
        "Identity": helper.make_node("Identity", [INPUT], ["a"], "node_under_test_Identity"),
        "Dropout": helper.make_node("Dropout", [INPUT], ["a"], "node_under_test_Dropout"),
        "Cast": helper.make_node("Cast", [INPUT], ["a"], "node_under_test_Cast", to=TensorProto.FLOAT),
        "CastLike": helper.make_node("CastLike", [INPUT, INPUT], ["a"], "node_under_test_CastLike"),
    }
    for op, node in ahead.items():
        yield Case(op, "before Relu", (node, behind), _IMAGE)
    is_nan = helper.make_node("IsNaN", [INPUT], ["n"], "node_under_test_IsNaN")
    zero = {"zero": np.array(0, np.float32)}
    instead = helper.make_node("Where", ["n", "zero", INPUT], ["a"], "where")
    yield Case("IsNaN", "zero instead", (is_nan, instead, behind), _IMAGE, zero)


def _choices() -> Iterator[Case]:
    """Functions that differ on both sides of a number."""
    bent = helper.make_node("Tanh", [INPUT], ["t"], "tanh")
    for op in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
        compare = helper.make_node(op, [INPUT, "k"], ["c"], f"node_under_test_{op}")
        choose = helper.make_node("Where", ["c", INPUT, "t"], [OUTPUT], "where")
        yield Case(op, "x or tanh(x)", (compare, bent, choose), _IMAGE, {"k": np.array(0.5, np.float32)})
    compare = helper.make_node("Greater", [INPUT, "k"], ["c"], "greater")
    choose = helper.make_node("Where", ["c", "t", INPUT], [OUTPUT], "node_under_test_Where")
    yield Case("Where", "tanh(x) or x", (compare, bent, choose), _IMAGE, {"k": np.array(-0.5, np.float32)})


def _bounds(*values: float) -> tuple[Array, ...]:
    return tuple(np.array(value, np.float32) for value in values)


def _pools() -> Iterator[Case]:
    for op in ("MaxPool", "AveragePool"):
        yield single(op, "2x2", _IMAGE, kernel_shape=[2, 2], strides=[2, 2])
        yield single(op, "padded", _IMAGE, kernel_shape=[3, 3], strides=[2, 1], pads=[1, 1, 1, 1])
        yield single(op, "ceiling", _IMAGE, kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1)
    yield single(
        "AveragePool", "padding counts", _IMAGE, kernel_shape=[3, 2], pads=[1, 0, 1, 1], count_include_pad=1
    )
    yield single("GlobalAveragePool", "image", _IMAGE)
    yield single("GlobalMaxPool", "image", _IMAGE)
    yield single("LpPool", "2x2", _IMAGE, kernel_shape=[2, 2], strides=[2, 2])


def _movements() -> Iterator[Case]:
    yield single("Flatten", "image", _IMAGE)
    yield single("Reshape", "with -1", _IMAGE, (_whole(0, 6, -1),))
    yield single("Reshape", "to a vector", _IMAGE, (_whole(-1, 6 * 9 * 8),))
    yield single("Transpose", "channels last", _IMAGE, perm=[0, 2, 3, 1])
    yield single("Squeeze", "height", (6, 1, 8), (_whole(2),))
    yield single("Unsqueeze", "a new axis", _SEQUENCE, (_whole(2),))
    yield single("Pad", "uneven", _IMAGE, (_whole(0, 0, 1, 2, 0, 0, 0, 1),))
    yield single("Slice", "channels", _IMAGE, (_whole(1), _whole(5), _whole(1), _whole(2)))
    yield single("Gather", "channels", _IMAGE, (_whole(4, 0, 2),), axis=1)
    yield single("Expand", "height", (6, 1, 8), (_whole(1, 6, 9, 8),))
    yield single("Tile", "width", _IMAGE, (_whole(1, 1, 1, 2),))
    yield single("DepthToSpace", "blocks of 2", (8, 4, 3), blocksize=2)
    yield single("DepthToSpace", "column, row, depth", (8, 4, 3), blocksize=2, mode="CRD")
    yield single("SpaceToDepth", "blocks of 2", (3, 4, 6), blocksize=2)
    twice = np.array([1, 1, 2, 2], np.float32)
    yield single(
        "Resize",
        "nearest, twice",
        _IMAGE,
        (None, twice),
        mode="nearest",
        nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )
    yield single(
        "Resize",
        "bilinear, twice",
        _IMAGE,
        (None, twice),
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    )
    halves = (
        helper.make_node("Split", [INPUT], ["a", "b"], "node_under_test_Split", axis=1, num_outputs=2),
        helper.make_node("Concat", ["b", "a"], [OUTPUT], "join", axis=1),
    )
    yield Case("Split", "halves, swapped", halves, _IMAGE)
    for title, outputs in (("first half", [OUTPUT, "b"]), ("second half", ["a", OUTPUT])):
        half = helper.make_node("Split", [INPUT], outputs, "node_under_test_Split", axis=1, num_outputs=2)
        yield Case("Split", title, (half,), _IMAGE)
    yield from _sequences()


def _sequences() -> Iterator[Case]:
    """Splitting as the exporter of PyTorch writes it."""
    for op in ("SplitToSequence", "SequenceAt"):
        names = {n: n.lower() for n in ("SplitToSequence", "SequenceAt")} | {op: f"node_under_test_{op}"}
        nodes = (
            helper.make_node("SplitToSequence", [INPUT, "size"], ["s"], names["SplitToSequence"], axis=1),
            helper.make_node("SequenceAt", ["s", "first"], ["a"], names["SequenceAt"]),
            helper.make_node("SequenceAt", ["s", "second"], ["b"], "second"),
            helper.make_node("Concat", ["b", "a"], [OUTPUT], "join", axis=1),
        )
        numbers = {"size": 3, "first": 0, "second": 1}
        initializers: dict[str, Array] = {name: np.array(n, np.int64) for name, n in numbers.items()}
        yield Case(op, "halves, swapped", nodes, _IMAGE, initializers)


def _whole(*values: int) -> Array:
    return np.array(values, np.int64)


def _reductions() -> Iterator[Case]:
    yield single("ReduceMean", "height and width", _IMAGE, (_whole(2, 3),))
    yield single("ReduceMean", "height and width dropped", _IMAGE, (_whole(-1, -2),), keepdims=0)
    for op in ("ReduceMax", "ReduceSum", "ReduceMin", "ReduceL2"):
        yield single(op, "height and width", _IMAGE, (_whole(2, 3),))
