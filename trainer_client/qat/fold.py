"""Folding of frozen batch norm into the convolution before it: a differentiable rewrite of the graph.

conv(x, w, b) followed by gamma * (. - mean) / sqrt(var + eps) + beta is one convolution with the weight w * g
and the bias (b - mean) * g + beta, g = gamma / sqrt(var + eps). The NPU computes with these folded numbers.
Here they are nodes of the graph, so gradients still reach weight, gamma and beta, and a pass over every
activation is saved.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

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
        numbers = graph.call_function(folded_numbers, (weight, bias, gamma, beta, mean, var, eps))
        folded_weight, folded_bias = (graph.call_function(operator.getitem, (numbers, i)) for i in (0, 1))
        folded = graph.call_function(conv.target, (conv.args[0], folded_weight, folded_bias, *conv.args[3:]))
    for user in list(norm.users):
        folded.meta = {VALUE_NAME: value_name(user), "val": user.meta.get("val")}
        user.replace_all_uses_with(folded)
        graph.erase_node(user)
    graph.erase_node(norm)
    graph.erase_node(conv)


def folded_numbers(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution, with their gradients; the module says how.

    Args:
        weight: shape (out, in / groups, ...).
        bias: shape (out,), as all that follow; of the convolution.
        gamma: of the batch norm.
        beta: of the batch norm.
        mean: its running mean.
        var: its running variance.
        eps: its epsilon.
    """
    deviation = torch.sqrt(torch.add(var, eps))
    return _Fold.apply(weight, bias, gamma, beta, mean, deviation)  # type: ignore[no-any-return, no-untyped-call]


class _Fold(torch.autograd.Function):
    """One function, because a dozen small operations for each layer cost 5 % of a training step."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        deviation: Tensor,
    ) -> tuple[Tensor, Tensor]:
        gain = deviation.reciprocal() if gamma is None else gamma / deviation
        centre = -mean if bias is None else bias - mean
        shift = centre * gain
        ctx.save_for_backward(weight, centre, deviation, gain)
        return weight * _by_output(gain, weight), shift if beta is None else shift + beta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
        weight, centre, deviation, gain = ctx.saved_tensors
        of_weight, of_bias, of_gamma, of_beta, of_mean, of_deviation = ctx.needs_input_grad
        grad_centre = grad_bias * gain
        grad_gamma = grad_deviation = None
        if of_gamma or of_deviation:
            inputs = tuple(range(1, weight.ndim))
            grad_gain = grad_bias * centre + (grad_weight * weight).sum(inputs)
            grad_gamma = grad_gain / deviation if of_gamma else None
            grad_deviation = -grad_gain * gain / deviation if of_deviation else None
        return (
            grad_weight * _by_output(gain, weight) if of_weight else None,
            grad_centre if of_bias else None,
            grad_gamma,
            grad_bias if of_beta else None,
            -grad_centre if of_mean else None,
            grad_deviation,
        )


def _by_output(gain: Tensor, weight: Tensor) -> Tensor:
    """Shape (out,) seen as (out, 1, ...) of the weight's rank."""
    return gain.view(-1, *(1,) * (weight.ndim - 1))
