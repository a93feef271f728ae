"""Small models that would unfold into huge ones, or take for ever."""

from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from .building import model, node, tensor


def unfolding() -> Iterator[tuple[str, ModelProto]]:
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


def long() -> Iterator[tuple[str, ModelProto]]:
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
