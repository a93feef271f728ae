"""Operators written out before a model becomes ONNX, where the exporter's own form would not do.

What the exporter makes of several ONNX nodes has values in between that nobody calibrates or injects; what it
expresses by the positions of elements has shapes that depend on data.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from trainer_client.qat.calls import call
from trainer_client.qat.einsum import write_out_einsum

_aten = torch.ops.aten


def write_out_operators(program: torch.export.ExportedProgram) -> None:
    """Replaces operators by simpler ones of the same values, in place."""
    graph = program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=_aten.conv3d.default):
        _give_bias(graph, node)
    returned = set(graph.output_node().all_input_nodes)
    for node in list(graph.nodes):
        write_out = _WRITTEN_OUT.get(node.target)
        if write_out is None or node in returned:
            continue
        with graph.inserting_before(node):
            simpler = write_out(graph, node)
        if simpler is not node:
            node.replace_all_uses_with(simpler)
            graph.erase_node(node)
    program.graph_module.recompile()


def _baddbmm(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Beta * given + alpha * (a @ b): the product is a tensor of the NPU."""
    given, a, b = node.args[:3]
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    product = call(graph, node, _aten.matmul.default, a, b)
    if alpha != 1:
        product = call(graph, node, _aten.mul.Tensor, product, alpha)
    if beta == 0:  # what is given counts for nothing then, not even as NaN
        return product
    if beta != 1:
        given = call(graph, node, _aten.mul.Tensor, given, beta)
    return call(graph, node, _aten.add.Tensor, given, product)


def _index_put(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """One number where a mask is true, x[mask] = 0: positions of it are as many as the data says."""
    source, indices, value, accumulate = (*node.args, False)[:4]
    mask = indices[0] if isinstance(indices, list | tuple) and len(indices) == 1 else None
    if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool or accumulate:
        return node
    assert isinstance(source, fx.Node)
    assert isinstance(value, fx.Node)
    if value.meta["val"].ndim:
        return node
    for _ in range(source.meta["val"].ndim - mask.meta["val"].ndim):
        mask = call(graph, node, _aten.unsqueeze.default, mask, -1)
    fill = _aten.masked_fill_ if node.target is _aten.index_put_.default else _aten.masked_fill
    filled = graph.call_function(fill.Tensor, (source, mask, value))
    filled.meta = dict(node.meta)
    return filled


def _give_bias(graph: fx.Graph, conv: fx.Node) -> None:
    """Zeros, where there is none: the exporter would add some of a wrong shape."""
    if len(conv.args) > 2 and conv.args[2] is not None:
        return
    weight = conv.args[1]
    assert isinstance(weight, fx.Node)
    value = weight.meta["val"]
    with graph.inserting_before(conv):
        options = {"dtype": value.dtype, "device": value.device}
        zeros = call(graph, conv, _aten.zeros.default, [value.shape[0]], **options)
    conv.args = (*conv.args[:2], zeros, *conv.args[3:])


_WRITTEN_OUT: dict[Any, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    _aten.baddbmm.default: _baddbmm,
    _aten.einsum.default: write_out_einsum,
    _aten.index_put.default: _index_put,
    _aten.index_put_.default: _index_put,
}
