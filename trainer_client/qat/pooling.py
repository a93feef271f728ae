"""Adaptive pools of sequences written out, before the exporter makes a view of strides of them."""

import torch
from torch import fx

_aten = torch.ops.aten


def write_out_pools(program: torch.export.ExportedProgram) -> None:
    """Replaces `adaptive_avg_pool1d` to one number by a mean, to any divisor of the length by a plain pool.

    The exporter decomposes it into a mean and an `as_strided` that changes nothing, which no NPU has.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is not _aten.adaptive_avg_pool1d.default:
            continue
        source, (size,) = node.args
        assert isinstance(source, fx.Node)
        length = source.meta["val"].shape[-1]
        if not isinstance(length, int) or length % size:
            continue
        if size == 1:
            node.target, node.args = _aten.mean.dim, (source, [-1], True)
        else:
            node.target, node.args = _aten.avg_pool1d.default, (source, [length // size], [length // size])
    program.graph_module.recompile()
