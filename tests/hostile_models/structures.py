"""Graphs in graphs, files outside, names twice, cycles."""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from .building import FLOAT, MIB, WEIGHT, conv, good, model, node, tensor


def nested() -> Iterator[tuple[str, ModelProto]]:
    """Branches, loops, functions and files outside."""
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


def graphs() -> Iterator[tuple[str, ModelProto]]:
    """Cycles, names twice, parts that are missing, versions of the future."""
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
