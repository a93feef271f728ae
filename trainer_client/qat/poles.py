"""Functions that end at zero, kept off it where the zero is one of eight bits.

The code of 0 stands for everything up to half an LSB. A mean of squares that is small but never 0 in FP32
can have that code, and `rsqrt` has neither value nor slope there: 0 times infinity in the backward pass makes
NaN of every gradient before it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_POSITIVE = frozenset(
    {_aten.sqrt.default, _aten.rsqrt.default, _aten.log.default, _aten.log2.default, _aten.log10.default}
)


def keep_off_pole(graph: fx.Graph, node: fx.Node, scales: dict[fx.Node, float]) -> None:
    """Gives a node half an LSB, without a gradient, where an operand of 8 bits is 0 and it has no value.

    Args:
        graph: that of the node.
        node: computes a layer.
        scales: the operands that hold an INT8 tensor's values, with its LSB.
    """
    found = _operand(node)
    if found is None or found[0] not in scales:
        return
    operand, away = found
    with graph.inserting_before(node):
        node.replace_input_with(operand, graph.call_function(away, (operand, scales[operand] / 2)))


def above_zero(x: Tensor, least: float) -> Tensor:
    """`x` where it is positive."""
    return torch.where(x > 0, x, least)


def not_zero(x: Tensor, least: float) -> Tensor:
    """`x` where it is not 0."""
    return torch.where(x == 0, least, x)


def _operand(node: fx.Node) -> tuple[fx.Node, Callable[[Tensor, float], Tensor]] | None:
    """The operand that a function ends at 0 of, and what keeps it away."""
    operand, other = (*node.args, None, None)[:2]
    if node.target in _POSITIVE:
        found = operand, above_zero
    elif node.target is _aten.reciprocal.default:
        found = operand, not_zero
    elif node.target is _aten.div.Tensor:
        found = other, not_zero
    elif node.target is _aten.pow.Tensor_Scalar and isinstance(other, int | float) and other < 1:
        found = operand, not_zero if float(other).is_integer() else above_zero
    else:
        return None
    return (found[0], found[1]) if isinstance(found[0], fx.Node) else None
