"""What a forward writes in place, as operators that both graphs compute alike and that have a gradient.

The exporter turns `y[..., :2] = x` into `copy`, which PyTorch cannot differentiate and whose ONNX form does
not broadcast, and leaves memory that is not written yet to chance.
"""

from typing import Any

import torch
from torch import fx

from trainer_client.qat.calls import call

_aten = torch.ops.aten
_ZEROS: dict[Any, Any] = {
    _aten.empty.memory_format: _aten.zeros.default,
    _aten.new_empty.default: _aten.new_zeros.default,
    _aten.empty_like.default: _aten.zeros_like.default,
}


def spell_out_writes(program: torch.export.ExportedProgram) -> None:
    """Gives what is written the shape and type of its place, and new memory zeros, in place."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target in _ZEROS:
            node.target = _ZEROS[node.target]
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
        elif node.target is _aten.copy_.default and isinstance(node.args[1], fx.Node):
            place, source = node.args[:2]
            with graph.inserting_before(node):
                fitting = _fitting(graph, place, source)
            node.args = (place, fitting)
    program.graph_module.recompile()


def differentiate_writes(graph: fx.GraphModule) -> None:
    """Replaces `copy` by the value that is copied, in place."""
    for node in graph.graph.find_nodes(op="call_function", target=_aten.copy.default):
        node.target, node.args, node.kwargs = _aten.clone.default, (node.args[1],), {}
    graph.recompile()


def _fitting(graph: fx.Graph, place: fx.Node, source: fx.Node) -> fx.Node:
    wanted, given = place.meta["val"], source.meta["val"]
    if wanted.dtype != given.dtype:
        source = call(graph, source, _aten.to.dtype, source, wanted.dtype)
    if wanted.shape == given.shape:
        return source
    return call(graph, source, _aten.expand_as.default, source, place)
