"""Multiplications of the host's operators, for the report: those that the NPU would be built for."""

import math
from collections.abc import Callable

from onnx import NodeProto

from npu_server.compile.graph import Shape

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def multiplications(node: NodeProto, shape_of: Callable[[str], Shape | None]) -> int:
    """Multiply-accumulates of one sample; 0 of operators that are no sums of products.

    Args:
        node: the node.
        shape_of: shape of a value with a batch of one; None where it is not known.
    """
    shapes = [shape_of(name) if name else () for name in node.input]
    result = shape_of(node.output[0]) if node.output[0] else ()
    if len(shapes) < 2 or any(s is None for s in shapes[:2]) or result is None:
        return 0
    x, w = shapes[0] or (), shapes[1] or ()
    if node.op_type in _GATES and len(w) == 3:
        length, batch, width = x
        hidden = w[1] // _GATES[node.op_type]
        return length * batch * w[0] * w[1] * (width + hidden)
    if node.op_type == "Conv":
        return math.prod(result) * math.prod(w[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(x) * math.prod(w[1:])
    if node.op_type in ("Gemm", "MatMul") and x:
        inner = x[0] if any(a.name == "transA" and a.i for a in node.attribute) else x[-1]
        return math.prod(result) * inner
    if node.op_type == "Einsum":
        return math.prod(result) * _summed(node, [shape or () for shape in shapes])
    return 0


def _summed(node: NodeProto, shapes: list[Shape]) -> int:
    """How many products an Einsum adds up for each number of its result."""
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation")
    left, arrow, right = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for part, shape in zip(left.split(","), shapes, strict=True):
        before, _, after = part.partition("...")
        sizes |= dict(zip(before, shape, strict=False))
        sizes |= dict(zip(after[::-1], shape[::-1], strict=False))
    gone = [label for label in sizes if label not in right and (arrow or left.count(label) > 1)]
    return math.prod(sizes[label] for label in gone)
