"""Folding of frozen batch norm into the convolution before it: a differentiable rewrite of the graph.

conv(x, w, b) followed by gamma * (. - mean) / sqrt(var + eps) + beta is one convolution with the weight w * g
and the bias (b - mean) * g + beta, g = gamma / sqrt(var + eps). The NPU computes with these folded numbers.
Here they are nodes of the graph, so gradients still reach weight, gamma and beta, and a pass over every
activation is saved.
"""

import operator

import torch
from torch import fx

_aten = torch.ops.aten
CONVOLUTIONS = frozenset(
    {
        _aten.conv1d.default,
        _aten.conv1d.padding,
        _aten.conv2d.default,
        _aten.conv2d.padding,
        _aten.conv3d.default,
    }
)
_BATCH_NORM = _aten._native_batch_norm_legit_no_training.default
VALUE_NAME = "npu_value_name"


def value_name(node: fx.Node) -> str:
    """ONNX value name of what a node of a training graph computes: the node's own, unless it was renamed."""
    return str(node.meta.get(VALUE_NAME, node.name))


def fold_batch_norm(graph: fx.Graph) -> fx.Graph:
    """Folds every frozen batch norm whose input is a convolution with no other consumer.

    Args:
        graph: training graph of a `Captured`; not changed.

    Returns:
        A new graph of the same function (equal up to float32 rounding). The folded convolution carries the
        value name of the batch norm's output; `value_name` reads it.
    """
    folded = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    outputs = folded.graph_copy(graph, copies)
    folded.output(outputs)
    for original, copy in copies.items():
        copy.meta[VALUE_NAME] = value_name(original)
    for node in list(folded.nodes):
        if node.op == "call_function" and node.target is _BATCH_NORM and _is_foldable(node):
            _fold(folded, node)
    folded.eliminate_dead_code()
    folded.lint()
    return folded


def _is_foldable(norm: fx.Node) -> bool:
    conv = norm.args[0]
    return (
        isinstance(conv, fx.Node)
        and conv.target in CONVOLUTIONS
        and len(conv.users) == 1
        and not conv.kwargs
        and all(user.target is operator.getitem and user.args[1] == 0 for user in norm.users)
    )


def _fold(graph: fx.Graph, norm: fx.Node) -> None:
    conv, gamma, beta, mean, var, _momentum, eps = norm.args
    assert isinstance(conv, fx.Node)
    weight, bias = conv.args[1], conv.args[2] if len(conv.args) > 2 else None
    assert isinstance(weight, fx.Node)
    assert callable(conv.target)
    with graph.inserting_before(norm):
        call = graph.call_function
        gain = call(torch.sqrt, (call(torch.add, (var, eps)),))
        gain = call(torch.div, (1.0 if gamma is None else gamma, gain))
        per_output = call(_broadcast_over_inputs, (gain, weight))
        folded_weight = call(torch.mul, (weight, per_output))
        centre = call(torch.neg, (mean,)) if bias is None else call(torch.sub, (bias, mean))
        shift = call(torch.mul, (centre, gain))
        folded_bias = shift if beta is None else call(torch.add, (shift, beta))
        folded = call(conv.target, (conv.args[0], folded_weight, folded_bias, *conv.args[3:]))
    for user in list(norm.users):
        folded.meta = {VALUE_NAME: value_name(user), "val": user.meta.get("val")}
        user.replace_all_uses_with(folded)
        graph.erase_node(user)
    graph.erase_node(norm)
    graph.erase_node(conv)


def _broadcast_over_inputs(gain: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Shape (out,) seen as (out, 1, ...) of the weight's rank."""
    return gain.view(-1, *(1,) * (weight.ndim - 1))
