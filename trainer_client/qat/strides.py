"""Operators that look at how a tensor lies in memory, made to look at its values only.

A training graph is traced with the example's memory order and runs with the NPU's: images channels-last.
`view` refuses an order that it was not traced with, and `as_strided` would read other elements.
"""

import torch
from torch import fx

_aten = torch.ops.aten
_VIEWS = frozenset({_aten.view.default, _aten._unsafe_view.default})
_POOL = _aten.adaptive_avg_pool2d.default


def pool_without_strides(program: torch.export.ExportedProgram) -> None:
    """Writes pooling to a single pixel as the mean that it is, in place.

    PyTorch does the same, and for images channels-last sets the strides of the result: an operator that looks
    at memory, in every network whose memory format is channels-last.
    """
    graph = program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=_POOL):
        source, size = node.args
        if set(size if isinstance(size, list | tuple) else [size]) == {1}:
            with graph.inserting_before(node):
                mean = graph.call_function(_aten.mean.dim, (source, [-1, -2], True))
            mean.meta = dict(node.meta)
            node.replace_all_uses_with(mean)
            graph.erase_node(node)
    program.graph_module.recompile()


def view_by_value(program: torch.export.ExportedProgram) -> None:
    """Replaces `view` by `reshape`, in place: what was written out has its values in another memory order.

    PyTorch's attention lays its result out such that heads can be merged by a view, a product does not.
    """
    for node in program.graph.nodes:
        if node.target in _VIEWS:
            node.target = _aten.reshape.default
    program.graph_module.recompile()


def forget_strides(graph: fx.GraphModule) -> None:
    """Replaces `view` by `reshape` and gives `as_strided` the order that it was traced with, in place.

    `type_as` looks at another tensor's type, as if the value depended on it; what is of the type already is
    taken as it is.
    """
    for node in graph.graph.nodes:
        if node.target is _aten.type_as.default and node.meta["val"].dtype == node.args[0].meta["val"].dtype:
            node.replace_all_uses_with(node.args[0])
            continue
        if node.target in _VIEWS:
            node.target = _aten.reshape.default
        elif node.target is _aten.as_strided.default:
            with graph.graph.inserting_before(node):
                source = node.args[0]
                dense = graph.graph.call_function(
                    _aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
                )
                dense.meta = {key: value for key, value in source.meta.items() if key == "val"}
            node.replace_input_with(source, dense)
    graph.recompile()
