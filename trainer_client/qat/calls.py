"""Nodes added to a captured program."""

from typing import Any

from torch import fx


def call(graph: fx.Graph, origin: fx.Node, target: Any, *args: Any, **options: Any) -> fx.Node:
    """A node that knows shape and dtype of its value, as the exporter demands.

    Args:
        graph: where it is inserted.
        origin: the node that it helps to replace.
        target: the operator.
        args: nodes and numbers.
        options: keyword arguments; no nodes.
    """
    node = graph.call_function(target, args, options)
    node.meta = {key: value for key, value in origin.meta.items() if key != "tensor_meta"}  # of its value
    with origin.meta["val"].fake_mode:
        values = fx.map_arg(args, lambda source: source.meta["val"])
        node.meta["val"] = target(*values, **options)
    return node
