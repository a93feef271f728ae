"""Attention written out, so that the tensors inside it are values of the training graph.

`scaled_dot_product_attention` is one node of an exported graph but several layers of an NPU: the scores and
the probabilities between them are INT8 tensors that add noise of their own. Written out, every one of them
has a name, a range and a place where it is injected.
"""

import math
from typing import Any

import torch
from torch import Tensor, fx

from trainer_client.qat.calls import call

_aten = torch.ops.aten
_ATTENTION = _aten.scaled_dot_product_attention.default
_PROBE_BATCH = 2


def write_out_attention(program: torch.export.ExportedProgram) -> None:
    """Replaces attention by softmax(q k^T * scale) v ("Attention Is All You Need", equation 1), in place.

    Its mask is added to the scores, where the server finds it and gives it to the softmax: the large negative
    numbers would leave an 8-bit score no resolution. They are finite: a query that may look at nothing looks
    at everything alike (torch's kernel gives 0 there). A mask that hides nothing is no mask (Hugging Face's
    models build one while they are exported). Heads that share keys and values get copies of them.
    """
    graph = program.graph_module.graph
    returned = set(graph.output_node().all_input_nodes)
    for node in list(graph.nodes):
        if node.target is _ATTENTION and node not in returned and not _dropout(node):
            _write_out(graph, node)
    graph.eliminate_dead_code(_is_kept)
    program.graph_module.recompile()


def _is_kept(node: fx.Node) -> bool:
    """Whether a node stays without users: what opens and closes a `torch.vmap` around others does."""
    return node.is_impure() or (
        node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload)
    )


def _write_out(graph: fx.Graph, node: fx.Node) -> None:
    query, key, value = node.args[:3]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    factor = node.kwargs.get("scale")
    if factor is None:
        factor = 1 / math.sqrt(query.meta["val"].shape[-1])
    with graph.inserting_before(node):
        if node.kwargs.get("enable_gqa"):
            heads = query.meta["val"].shape[-3]
            key, value = (_repeated_heads(graph, node, shared, heads) for shared in (key, value))
        transposed = call(graph, node, _aten.transpose.int, key, -2, -1)
        scores = call(graph, node, _aten.matmul.default, query, transposed)
        scaled = call(graph, node, _aten.mul.Tensor, scores, factor)
        scaled = _masked(graph, node, scaled)
        probabilities = call(graph, node, _aten.softmax.int, scaled, -1)
        attended = call(graph, node, _aten.matmul.default, probabilities, value)
    node.replace_all_uses_with(attended)
    graph.erase_node(node)


def _masked(graph: fx.Graph, node: fx.Node, scores: fx.Node) -> fx.Node:
    """The scores with what is hidden far below them."""
    mask, _, causal = (*node.args[3:], *[None] * 3)[:3]
    queries, keys = scores.meta["val"].shape[-2:]
    lowest = torch.finfo(torch.float32).min
    if causal:
        options = {"dtype": torch.bool, "device": scores.meta["val"].device}
        everything = call(graph, node, _aten.ones.default, [queries, keys], **options)
        mask = call(graph, node, _aten.tril.default, everything)
    elif not isinstance(mask, fx.Node) or _hides_nothing(mask):
        return scores
    assert isinstance(mask, fx.Node)
    if mask.meta["val"].dtype == torch.bool:
        hidden = call(graph, node, _aten.logical_not.default, mask)
        return call(graph, node, _aten.masked_fill.Scalar, scores, hidden, lowest)
    finite = call(graph, node, _aten.clamp.default, mask, lowest)
    return call(graph, node, _aten.add.Tensor, scores, finite)


def _repeated_heads(graph: fx.Graph, node: fx.Node, shared: fx.Node, heads: int) -> fx.Node:
    """(N, shared heads, T, C) -> (N, heads, T, C), each head as often as there are queries for it."""
    own = shared.meta["val"].shape[-3]
    apart = call(graph, node, _aten.unsqueeze.default, shared, 2)
    copies = call(graph, node, _aten.expand.default, apart, [-1, -1, heads // own, -1, -1])
    return call(graph, node, _aten.flatten.using_ints, copies, 1, 2)


def _dropout(node: fx.Node) -> bool:
    return bool((*node.args[3:], None, None)[1]) or bool(node.kwargs.get("dropout_p"))


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
        elif isinstance(node.target, torch._ops.OpOverload):
            sources = {source: _evaluate(source, known) for source in node.all_input_nodes}
            if all(value is not None for value in sources.values()):
                args, kwargs = fx.map_arg((node.args, node.kwargs), sources.__getitem__)
                known[node] = node.target(*args, **kwargs)
    return known[node]
