"""Nodes with attributes, operands and dimensions that cannot be."""

from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, TensorProto, helper

from .building import FLOAT, WEIGHT, conv, good, model, node, tensor


def attributes() -> Iterator[tuple[str, ModelProto]]:
    """Attributes that are absurd, missing or of another kind."""
    big = 2**62
    absurd: list[dict] = [
        {"strides": [0, 0]},
        {"strides": [-1, 1]},
        {"strides": [big, big]},
        {"strides": [1]},
        {"strides": []},
        {"strides": [1, 1, 1]},
        {"dilations": [0, 1]},
        {"dilations": [big, 1]},
        {"dilations": [-(2**63), 1]},
        {"pads": [-1, 0, 0, 0]},
        {"pads": [big, big, big, big]},
        {"pads": [65535] * 4},
        {"pads": [1, 1]},
        {"group": 0},
        {"group": -3},
        {"group": big},
        {"group": 2},
        {"kernel_shape": [5, 5]},
        {"kernel_shape": [3]},
        {"kernel_shape": []},
        {"kernel_shape": [big, big]},
        {"auto_pad": "SOMEWHERE"},
        {"auto_pad": "SAME_UPPER", "strides": [0, 1]},
        {"auto_pad": b"\xff\xfe"},
        {"strides": 1},
        {"strides": "two"},
        {"strides": [1.5, 1.5]},
        {"group": 1.0},
        {"pads": helper.make_tensor("t", FLOAT, [1], [1.0])},
        {"unknown_attribute": 1},
    ]
    for attributes in absurd:
        yield f"conv {attributes}"[:60], model([conv(**attributes)], {"w": WEIGHT})
    for op in ("MaxPool", "AveragePool"):
        for attributes in (
            {},
            {"kernel_shape": [0, 0]},
            {"kernel_shape": [2, 2], "strides": [0, 0]},
            {"kernel_shape": [big, 1]},
            {"kernel_shape": [2, 2], "pads": [9, 9, 9, 9]},
            {"kernel_shape": [2, 2], "pads": [60000] * 4},
            {"kernel_shape": [2, 2], "ceil_mode": big},
            {"kernel_shape": [60000, 60000], "pads": [60000] * 4},
            {"kernel_shape": [2, 2], "dilations": [0, 0]},
            {"kernel_shape": [-2, 2]},
        ):
            yield f"{op} {attributes}"[:60], model([node(op, ["x"], ["y"], **attributes)])
    for value in (float("nan"), float("inf"), -1e38):
        weights = {"w": np.ones((192, 4), np.float32), "c": np.ones(4, np.float32)}
        nodes = [node("Flatten", ["x"], ["a"]), node("Gemm", ["a", "w", "c"], ["y"], alpha=value, beta=value)]
        yield f"gemm alpha {value}", model(nodes, weights)
        yield f"hard sigmoid {value}", model([node("HardSigmoid", ["x"], ["y"], alpha=value, beta=value)])
        yield (
            f"clip {value}",
            model([node("Clip", ["x", "l", "h"], ["y"])], {"l": np.float32(value), "h": np.float32(1)}),
        )
        norm = {n: np.full(3, v, np.float32) for n, v in zip("sbmv", (1, 0, 0, 1), strict=True)}
        yield (
            f"batch norm {value}",
            model([node("BatchNormalization", ["x", *"sbmv"], ["y"], epsilon=value)], norm),
        )
        yield f"add {value}", model([node("Add", ["x", "k"], ["y"])], {"k": np.float32(value)})
        yield (
            f"div tanh {value}",
            model([node("Tanh", ["x"], ["a"]), node("Div", ["a", "k"], ["y"])], {"k": np.float32(value)}),
        )
    negative = {n: np.full(3, v, np.float32) for n, v in zip("sbmv", (1, 0, 0, -5), strict=True)}
    yield "negative variance", model([node("BatchNormalization", ["x", *"sbmv"], ["y"])], negative)
    yield "concat axis", model([node("Concat", ["x", "x"], ["y"], axis=big)])
    yield "concat no axis", model([node("Concat", ["x", "x"], ["y"])])
    yield "flatten axis", model([node("Flatten", ["x"], ["y"], axis=big)])
    yield (
        "dropout ratio",
        model(
            [node("Dropout", ["x", "r", "t"], ["a"]), node("Relu", ["a"], ["y"])],
            {"r": np.float32(2), "t": np.array(True)},
        ),
    )


def operands() -> Iterator[tuple[str, ModelProto]]:
    """Weights and operands that do not fit."""
    for pads in (
        [2**62] * 8,
        [-(2**62)] * 8,
        [1] * 3,
        [0, 0, 2**31, 0, 0, 0, 2**31, 0],
        [0, 0, -9, 0, 0, 0, 0, 0],
        [],
    ):
        yield f"pad {pads}"[:50], model([node("Pad", ["x", "p"], ["y"])], {"p": np.array(pads, np.int64)})
    for target in (
        [0, -1, -1],
        [-1, 2**62],
        [2**31, 2**31],
        [0, 0, 0, 0, 0, 0],
        [-5, -1],
        [],
        [0, 3, 0],
        [-1],
    ):
        yield (
            f"reshape {target}"[:50],
            model([node("Reshape", ["x", "s"], ["y"])], {"s": np.array(target, np.int64)}),
        )
    yield "reshape by floats", model([node("Reshape", ["x", "s"], ["y"])], {"s": np.ones(2, np.float32)})
    yield "reshape by a matrix", model([node("Reshape", ["x", "s"], ["y"])], {"s": np.ones((2, 2), np.int64)})
    for axes in ([9], [-9], [2, 2], [2**62], []):
        yield (
            f"mean over {axes}",
            model([node("ReduceMean", ["x", "s"], ["y"])], {"s": np.array(axes, np.int64)}),
        )
    for shape in ((4, 3, 0, 0), (0, 3, 3, 3), (4, 3, 3), (4, 3, 3, 3, 3), (), (4, 2, 3, 3), (4, 3, 99, 99)):
        yield f"conv weight {shape}", model([conv()], {"w": np.ones(shape, np.float32)})
    for dtype in (np.int64, np.int8, np.float64, np.float16, np.bool_, np.complex64, np.uint64):
        yield f"weight {np.dtype(dtype)}", model([conv()], {"w": WEIGHT.astype(dtype)})
        yield (
            f"bias {np.dtype(dtype)}",
            model([node("Conv", ["x", "w", "k"], ["y"])], {"w": WEIGHT, "k": np.ones(4, dtype)}),
        )
        yield f"add {np.dtype(dtype)}", model([node("Add", ["x", "k"], ["y"])], {"k": np.ones(1, dtype)})
    for size in (0, 3, 5, 1):
        yield (
            f"bias of {size}",
            model([node("Conv", ["x", "w", "k"], ["y"])], {"w": WEIGHT, "k": np.ones(size, np.float32)}),
        )
    for data_type in (
        TensorProto.STRING,
        TensorProto.BFLOAT16,
        TensorProto.FLOAT8E4M3FN,
        TensorProto.INT4,
        0,
        99,
    ):
        yield (
            f"weight of type {data_type}",
            model([conv()], {"w": tensor("w", [4, 3, 3, 3], data_type, bytes(432))}),
        )
    strings = helper.make_tensor("w", TensorProto.STRING, [2], [b"a", b"\xff"])
    yield "string weight", model([conv()], {"w": strings})
    for value in (np.nan, np.inf, 3e38, 1e-45, 0.0):
        yield f"weight of {value}", model([conv()], {"w": np.full_like(WEIGHT, value)})
        yield (
            f"gemm of {value}",
            model(
                [node("Flatten", ["x"], ["a"]), node("MatMul", ["a", "w"], ["y"])],
                {"w": np.full((192, 3), value, np.float32)},
            ),
        )
    yield (
        "gemm of nothing",
        model(
            [node("Flatten", ["x"], ["a"]), node("MatMul", ["a", "w"], ["y"])],
            {"w": np.ones((0, 3), np.float32)},
        ),
    )
    yield (
        "gemm to nothing",
        model(
            [node("Flatten", ["x"], ["a"]), node("MatMul", ["a", "w"], ["y"])],
            {"w": np.ones((192, 0), np.float32)},
        ),
    )
    yield "clip by a matrix", model([node("Clip", ["x", "l"], ["y"])], {"l": np.ones((2, 2), np.float32)})
    yield "clip by nothing", model([node("Clip", ["x", "l", "l"], ["y"])], {"l": np.ones(0, np.float32)})
    yield "missing inputs", model([node("Add", ["x"], ["y"])])
    yield "empty input names", model([node("Add", ["", "x"], ["y"])])
    yield "empty output name", model([node("Relu", ["x"], [""])])
    yield "too many inputs", model([node("Relu", ["x"] * 50, ["y"])])
    yield "many operands", model([node("Concat", ["x"] * 10_000, ["y"], axis=1)])


def dimensions() -> Iterator[tuple[str, ModelProto]]:
    """Dimensions that contradict the bytes, or are vast."""
    for dims in (
        [2**31, 2**31],
        [-1, 3],
        [2**62, 4],
        [2**63 - 1],
        [0, 2**62],
        [1] * 200,
        [2**26, 2],
        [2**26 - 1],
    ):
        yield f"tensor of {dims}"[:50], model([conv()], {"w": tensor("w", dims)})
    yield "less bytes than dimensions", model([conv()], {"w": tensor("w", [4, 3, 3, 3], raw=bytes(8))})
    yield "more bytes than dimensions", model([conv()], {"w": tensor("w", [4, 3, 3, 3], raw=bytes(8000))})
    both = tensor("w", [4, 3, 3, 3], raw=bytes(432))
    both.float_data.extend([1.0] * 108)
    yield "two kinds of data", model([conv()], {"w": both})
    for shape in (
        ("batch", 2**62, 8, 8),
        ("batch", -3, 8, 8),
        ("batch", 0, 8, 8),
        (0, 3, 8, 8),
        (-1, 3, 8, 8),
        (),
        ("batch",),
        ("batch", 2**20, 2**20),
        ("batch", *[1] * 60),
        (2**62, 3, 8, 8),
        ("batch", "c", "h", "w"),
    ):
        yield f"input of {shape}"[:50], model([node("Relu", ["x"], ["y"])], shape=shape)
        yield f"flatten of {shape}"[:50], model([node("Flatten", ["x"], ["y"])], shape=shape)
    no_type = good()
    no_type.graph.input[0].ClearField("type")
    yield "input without a type", no_type
    sequence = good()
    sequence.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = FLOAT
    yield "input is a sequence", sequence
