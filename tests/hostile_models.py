"""ONNX models that nobody means well with: each must be refused with a clear error, or compile."""

from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

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


def _attributes() -> Iterator[tuple[str, ModelProto]]:
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


def _operands() -> Iterator[tuple[str, ModelProto]]:
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


def _dimensions() -> Iterator[tuple[str, ModelProto]]:
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


def _unfolding() -> Iterator[tuple[str, ModelProto]]:
    """Small models whose constants would be large."""
    many = np.array([1, 2**31, 2**31, 1])
    yield "tile", model([node("Tile", ["x", "s"], ["y"])], {"s": many})
    yield "expand of x", model([node("Expand", ["x", "s"], ["y"])], {"s": many}, ("batch", 1, 1, 8))
    for mode in ("nearest", "linear"):
        sizes, scales = np.array([1, 3, 2**40, 8]), np.array([1, 1, 1e9, 1], np.float32)
        yield (
            f"resize to, {mode}",
            model([node("Resize", ["x", "", "", "s"], ["y"], mode=mode)], {"s": sizes}),
        )
        yield f"resize by, {mode}", model([node("Resize", ["x", "", "s"], ["y"], mode=mode)], {"s": scales})
    yield "split into many", model([node("Split", ["x"], ["y"], num_outputs=2**62)])
    one, vast = np.ones(1, np.float32), np.array([2**13, 2**13], np.int64)
    use = node("Add", ["x", "k"], ["y"])
    yield (
        "range",
        model(
            [node("Range", ["s", "l", "t"], ["k"]), use],
            {"s": np.float32(0), "l": np.float32(1e30), "t": np.float32(1)},
        ),
    )
    yield (
        "tiny steps",
        model(
            [node("Range", ["s", "l", "t"], ["k"]), use],
            {"s": np.float32(0), "l": np.float32(1), "t": np.float32(1e-40)},
        ),
    )
    for value in (np.nan, np.inf):
        yield (
            f"range to {value}",
            model(
                [node("Range", ["s", "l", "t"], ["k"]), use],
                {"s": np.float32(0), "l": np.float32(value), "t": np.float32(1)},
            ),
        )
    yield (
        "range of nothing",
        model([node("Range", ["s", "s", "s"], ["k"]), use], {"s": np.ones(0, np.float32)}),
    )
    yield (
        "constant of a vast shape",
        model([node("ConstantOfShape", ["s"], ["k"]), use], {"s": np.array([2**62, 2**62])}),
    )
    yield (
        "constant of a negative shape",
        model([node("ConstantOfShape", ["s"], ["k"]), use], {"s": np.array([-4, 4])}),
    )
    yield (
        "constant of rank 100",
        model([node("ConstantOfShape", ["s"], ["k"]), use], {"s": np.ones(100, np.int64)}),
    )
    yield "expand", model([node("Expand", ["o", "s"], ["k"]), use], {"o": one, "s": np.array([2**40])})
    nodes = [node("ConstantOfShape", ["s"], [f"k{i}"]) for i in range(64)]
    nodes += [node("Add", [f"k{i}" if i == 0 else f"t{i}", f"k{i + 1}"], [f"t{i + 1}"]) for i in range(63)]
    nodes.append(node("MatMul", ["x", "t63"], ["y"]))
    yield "many large constants", model(nodes, {"s": vast}, ("batch", 2**13))
    nodes = [node("Expand", ["o", "s"], ["t0"])] + [node("Exp", [f"t{i}"], [f"t{i + 1}"]) for i in range(300)]
    yield (
        "a long chain of large constants",
        model([*nodes, node("MatMul", ["x", "t300"], ["y"])], {"o": one, "s": vast}, ("batch", 2**13)),
    )
    nodes = [node("Expand", ["o", "s"], ["w"])]
    nodes += [
        node("MatMul", ["x" if i == 0 else f"a{i}", "w"], [f"a{i + 1}" if i < 199 else "y"])
        for i in range(200)
    ]
    yield (
        "one large weight for many layers",
        model(nodes, {"o": one, "s": np.array([2**12, 2**12])}, ("batch", 2**12)),
    )
    nodes = [node("Concat", ["o" if i == 0 else f"t{i}"] * 2, [f"t{i + 1}"], axis=0) for i in range(60)]
    yield "doubling", model([*nodes, node("Add", ["x", "t60"], ["y"])], {"o": one})
    nodes = [node("Gather", ["o" if i == 0 else f"t{i}", "g"], [f"t{i + 1}"]) for i in range(30)]
    yield (
        "gather doubles",
        model([*nodes, node("Add", ["x", "t30"], ["y"])], {"o": one, "g": np.zeros((4, 4), np.int64)}),
    )
    yield (
        "outer product",
        model(
            [node("Mul", ["l", "r"], ["k"]), use],
            {"l": np.ones((2**20, 1), np.float32), "r": np.ones((1, 2**20), np.float32)},
        ),
    )
    yield "power tower", model([node("Pow", ["l", "l"], ["k"]), use], {"l": np.full(4, 2**40, np.int64)})
    yield "cast to string", model([node("Cast", ["o"], ["k"], to=TensorProto.STRING), use], {"o": one})
    yield "cast to nothing", model([node("Cast", ["o"], ["k"], to=99), use], {"o": one})
    yield "transpose of nonsense", model([node("Transpose", ["o"], ["k"], perm=[5, 5, 5]), use], {"o": one})
    yield (
        "unsqueeze far away",
        model([node("Unsqueeze", ["o", "s"], ["k"]), use], {"o": one, "s": np.array([2**40])}),
    )
    yield (
        "slice by zero",
        model([node("Slice", ["o", "s", "s", "s", "s"], ["k"]), use], {"o": one, "s": np.zeros(1, np.int64)}),
    )
    yield (
        "divided by zero",
        model(
            [node("Div", ["i", "z"], ["k"]), node("Reshape", ["x", "k"], ["y"])],
            {"i": np.ones(2, np.int64), "z": np.zeros(2, np.int64)},
        ),
    )
    yield "constant strings", model([node("Constant", [], ["k"], value_strings=[b"\xff"] * 10), use])
    yield "constant without a value", model([node("Constant", [], ["k"]), use])
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(one, "v"), tensor("i", [1], TensorProto.INT64, bytes(8)), [2**40]
    )
    yield "sparse constant", model([node("Constant", [], ["k"], sparse_value=sparse), use])
    whole = model([use])
    whole.graph.sparse_initializer.append(sparse)
    yield "sparse initializer", whole
    yield (
        "shape of x by many",
        model([node("Shape", ["x"], ["k"], start=-(2**62), end=2**62), node("Reshape", ["x", "k"], ["y"])]),
    )
    yield (
        "size of x",
        model(
            [
                node("Size", ["x"], ["k"]),
                node("ConstantOfShape", ["k"], ["w"]),
                node("Add", ["x", "w"], ["y"]),
            ]
        ),
    )


def _long() -> Iterator[tuple[str, ModelProto]]:
    """Many nodes: nothing may take the square of their number."""
    for op in ("Relu", "Tanh", "Identity"):
        chain = [
            node(op, ["x" if i == 0 else f"t{i}"], [f"t{i + 1}" if i < 2999 else "y"]) for i in range(3000)
        ]
        yield f"3000 times {op}", model(chain)
    doubling = [
        node("Add", ["x" if i == 0 else f"t{i}"] * 2, [f"t{i + 1}" if i < 2999 else "y"]) for i in range(3000)
    ]
    yield "3000 times twice itself", model(doubling)
    ladder = [
        node("Add", ["x" if i == 0 else f"t{i}", "x"], [f"t{i + 1}" if i < 2999 else "y"])
        for i in range(3000)
    ]
    yield "3000 additions of x", model(ladder)
    scaled = [
        node("Mul", ["x" if i == 0 else f"t{i}", "k"], [f"t{i + 1}" if i < 2999 else "y"])
        for i in range(3000)
    ]
    yield "3000 constants folded", model(scaled, {"k": np.float32(1)})
    convs = [
        node("Conv", ["x" if i == 0 else f"t{i}", "w"], [f"t{i + 1}" if i < 1999 else "y"])
        for i in range(2000)
    ]
    yield "2000 convolutions of one weight", model(convs, {"w": np.ones((3, 3, 1, 1), np.float32)})
    constants = [node("Neg", ["k" if i == 0 else f"k{i}"], [f"k{i + 1}"]) for i in range(3000)]
    yield "3000 foldable nodes", model([*constants, node("Add", ["x", "k3000"], ["y"])], {"k": np.float32(1)})
    yield (
        "too many nodes",
        model([node("Relu", ["x"], [f"t{i}"]) for i in range(20_001)] + [node("Relu", ["x"], ["y"])]),
    )


def _nested() -> Iterator[tuple[str, ModelProto]]:
    branch = helper.make_graph(
        [node("Relu", ["x"], ["b"])], "branch", [], [helper.make_tensor_value_info("b", FLOAT, None)]
    )
    inner: GraphProto = branch
    for depth in (1, 25):  # protobuf itself refuses what is much deeper
        inner = branch
        for _ in range(depth):
            again = helper.make_node("If", ["q"], ["b"], "n", then_branch=inner, else_branch=branch)
            inner = helper.make_graph(
                [again], "branch", [], [helper.make_tensor_value_info("b", FLOAT, None)]
            )
        yield (
            f"{depth} branches in one another",
            model([node("If", ["q"], ["y"], then_branch=inner, else_branch=branch)], {"q": np.array(True)}),
        )
    body = helper.make_graph(
        [node("Identity", ["p"], ["q"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("p", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("q", TensorProto.BOOL, [])],
    )
    yield (
        "endless loop",
        model([node("Loop", ["", "t"], [], body=body), node("Relu", ["x"], ["y"])], {"t": np.array(True)}),
    )
    hidden = helper.make_graph(
        [node("Identity", ["w"], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", FLOAT, None)],
        [outside()],
    )
    yield (
        "external data in a branch",
        model([node("If", ["q"], ["y"], then_branch=hidden, else_branch=hidden)], {"q": np.array(True)}),
    )
    yield (
        "external data in a foldable branch",
        model(
            [
                node("If", ["q"], ["k"], then_branch=hidden, else_branch=hidden),
                node("Add", ["x", "k"], ["y"]),
            ],
            {"q": np.array(True)},
        ),
    )
    yield "external data", model([conv()], {"w": outside()})
    listed = node("Relu", ["x"], ["y"])
    listed.attribute.append(
        onnx.AttributeProto(name="ts", type=onnx.AttributeProto.TENSORS, tensors=[outside()])
    )
    yield "external data in a list", model([listed])
    function = helper.make_function(
        "local",
        "F",
        ["i"],
        ["o"],
        [node("F", ["i"], ["o"], domain="local")],
        [helper.make_opsetid("local", 1)],
    )
    recursive = model([node("F", ["x"], ["y"], domain="local")])
    recursive.functions.append(function)
    recursive.opset_import.append(helper.make_opsetid("local", 1))
    yield "a function that calls itself", recursive


def outside() -> TensorProto:
    """A tensor that is stored in a file of this machine."""
    away = tensor("w", [4, 3, 3, 3])
    away.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "/etc/passwd"), ("offset", "0"), ("length", "432")):
        away.external_data.add(key=key, value=value)
    return away


def _graphs() -> Iterator[tuple[str, ModelProto]]:
    yield "cycle", model([node("Relu", ["b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["b"], ["y"])])
    yield "node that feeds itself", model([node("Add", ["x", "y"], ["y"])])
    yield "wrong order", model([node("Relu", ["a"], ["y"]), node("Relu", ["x"], ["a"])])
    yield "output name twice", model([node("Relu", ["x"], ["y"]), node("Tanh", ["x"], ["y"])])
    yield "output named like the input", model([node("Relu", ["x"], ["x"]), node("Relu", ["x"], ["y"])])
    yield "output named like a weight", model([node("Relu", ["x"], ["w"]), conv()], {"w": WEIGHT})
    yield "both outputs one name", model([node("Dropout", ["x"], ["y", "y"])])
    twice = model([conv()], {"w": WEIGHT})
    twice.graph.initializer.append(numpy_helper.from_array(WEIGHT, "w"))
    yield "initializer twice", twice
    shadow = model([node("Relu", ["x"], ["y"])], {"x": np.ones((2, 3, 8, 8), np.float32)})
    yield "input that is an initializer", shadow
    for what in ("input", "output", "node"):
        empty = good()
        getattr(empty.graph, what).__delitem__(slice(None))
        yield f"no {what}", empty
        doubled = good()
        getattr(doubled.graph, what).extend(list(getattr(good().graph, what)))
        yield f"{what} twice", doubled
    nothing = ModelProto()
    yield "empty model", nothing
    yield "output is a weight", model([node("Identity", ["w"], ["y"])], {"w": WEIGHT})
    yield "unknown operator", model([node("Frobnicate", ["x"], ["y"])])
    yield "unknown domain", model([node("Conv", ["x", "w"], ["y"], domain="evil")], {"w": WEIGHT})
    foreign = model([node("Relu", ["x"], ["y"], domain="evil")])
    foreign.opset_import.append(helper.make_opsetid("evil", 1))
    yield "operator of another domain", foreign
    constant = model([node("Shape", ["x"], ["k"], domain="evil"), node("Reshape", ["x", "k"], ["y"])])
    constant.opset_import.append(helper.make_opsetid("evil", 1))
    yield "foldable operator of another domain", constant
    for version in (0, -1, 1, 12, 25, 2**62):
        yield f"opset {version}", model([node("Relu", ["x"], ["y"])], opset=version)
    no_opset = good()
    del no_opset.opset_import[:]
    yield "no opset", no_opset
    two = good()
    two.opset_import.append(helper.make_opsetid("ai.onnx", 7))
    yield "two opsets", two
    for name in ("n" * 5 * MIB, "\x00\n\r\t", "é\U0001f600" * 3000, "%s{0}[bold]", ""):
        named = model([helper.make_node("Det", ["x"], ["y"], name)])
        yield f"node called {name[:9]!r}", named
    wide = model([node("Erf", ["x"], ["o" * 3 * MIB]), node("Relu", ["o" * 3 * MIB], ["y"])])
    yield "value with a long name", wide
    old = good()
    old.ir_version = 2**40
    yield "IR version of the future", old
    no_dims = good()
    no_dims.graph.output[0].type.tensor_type.ClearField("shape")
    yield "output without a shape", no_dims
    whole = good()
    whole.graph.output[0].type.tensor_type.elem_type = TensorProto.STRING
    yield "output of strings", whole


def ranges_for(data: bytes) -> dict[str, tuple[float, float]]:
    """A range for every value that a model names, as far as it can be read."""
    try:
        nodes = onnx.load_from_string(data).graph.node
    except Exception:  # the whole point of these bytes
        return RANGES
    return RANGES | {name: (-1.0, 1.0) for each in nodes for name in each.output if len(name) < 100}


def hostile_models() -> Iterator[tuple[str, bytes]]:
    """All of them, by title."""
    kinds: tuple[Callable[[], Iterator[tuple[str, ModelProto]]], ...] = (
        _attributes,
        _operands,
        _dimensions,
        _unfolding,
        _long,
        _nested,
        _graphs,
    )
    for kind in kinds:
        for title, proto in kind():
            yield title, proto.SerializeToString()
    sound = good().SerializeToString()
    for cut in range(0, len(sound), max(1, len(sound) // 40)):
        yield f"cut after {cut} bytes", sound[:cut]
    yield "text", b"these bytes are no model"
    yield "zeros", bytes(10_000)
    yield "nested groups", b"\x3a" + b"\x0a\x80\x80\x01" * 20_000
    yield "a length of exabytes", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
    yield "a name that is no UTF-8", sound.replace(b"node0", b"\xff\xfe\xff\xfeX")


RANGE_ATTACKS: dict[str, dict[str, tuple[float, float]]] = {
    "none": {},
    "NaN": {**RANGES, "x": (float("nan"), 1.0)},
    "infinite": {**RANGES, "a": (-float("inf"), float("inf"))},
    "reversed": {**RANGES, "a": (1.0, -1.0)},
    "no width": {**RANGES, "y": (0.0, 0.0)},
    "denormal": {**RANGES, "y": (0.0, 1e-45)},
    "vast": {**RANGES, "y": (-3e38, 3e38)},
    "one vast": {**RANGES, "x": (-3e38, 3e38), "y": (-1e-30, 1e-30)},
    "far from zero": {**RANGES, "x": (1e30, 2e30)},
    "of nobody": {**RANGES, "stranger": (float("nan"), float("nan"))},
}
