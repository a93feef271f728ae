"""Attention written out, so that the tensors inside it are values of the training graph.

`scaled_dot_product_attention` is one node of an exported graph but several layers of an NPU: the scores and
the probabilities between them are INT8 tensors that add noise of their own. Written out, every one of them
has a name, a range and a place where it is injected.
"""

import math
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_ATTENTION = _aten.scaled_dot_product_attention.default
_PROBE_BATCH = 2


def write_out_attention(program: torch.export.ExportedProgram) -> None:
    """Replaces attention by softmax(q k^T * scale) v ("Attention Is All You Need", equation 1), in place.

    Masked attention is left as it is: the large negative numbers of a mask leave an 8-bit score no
    resolution. A mask that hides nothing is no mask (Hugging Face's models build one while they are
    exported).
    """
    graph = program.graph_module.graph
    returned = set(graph.output_node().all_input_nodes)
    for node in list(graph.nodes):
        if node.target is _ATTENTION and node not in returned and _is_plain(node):
            _write_out(graph, node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _write_out(graph: fx.Graph, node: fx.Node) -> None:
    query, key, value = node.args[:3]
    assert isinstance(query, fx.Node)
    factor = node.kwargs.get("scale")
    if factor is None:
        factor = 1 / math.sqrt(query.meta["val"].shape[-1])
    with graph.inserting_before(node):
        transposed = _call(graph, node, _aten.transpose.int, key, -2, -1)
        scores = _call(graph, node, _aten.matmul.default, query, transposed)
        scaled = _call(graph, node, _aten.mul.Tensor, scores, factor)
        probabilities = _call(graph, node, _aten.softmax.int, scaled, -1)
        attended = _call(graph, node, _aten.matmul.default, probabilities, value)
    node.replace_all_uses_with(attended)
    graph.erase_node(node)


def _call(graph: fx.Graph, origin: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A node that knows shape and dtype of its value, as the exporter demands."""
    node = graph.call_function(target, args)
    node.meta = dict(origin.meta)
    node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
    return node


def _is_plain(node: fx.Node) -> bool:
    mask, dropout, causal = (*node.args[3:], *[None] * 3)[:3]
    if dropout or causal or node.kwargs.get("enable_gqa"):
        return False
    return mask is None or (isinstance(mask, fx.Node) and _hides_nothing(mask))


def _hides_nothing(mask: fx.Node) -> bool:
    values = _evaluate(mask, {})
    if not isinstance(values, Tensor):
        return False
    return bool(values.all()) if values.dtype == torch.bool else not values.any()


def _evaluate(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """Value of a node that depends on the size of the batch at most; None for any other."""
    if node not in known:
        known[node] = None
        if node.target is _aten.sym_size.int:
            size = node.meta["val"]
            known[node] = size if isinstance(size, int) else _PROBE_BATCH
        elif node.op == "call_function" and callable(node.target):
            sources = {source: _evaluate(source, known) for source in node.all_input_nodes}
            if all(value is not None for value in sources.values()):
                args, kwargs = fx.map_arg((node.args, node.kwargs), sources.__getitem__)
                known[node] = node.target(*args, **kwargs)
    return known[node]
