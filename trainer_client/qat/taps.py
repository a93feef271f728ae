"""The training graph with the NPU's tensors woven in: after each layer that the NPU reports, an injection.

The result is plain generated Python that calls the two methods of `TapContext`, and frees every value after
its last use.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx

from npu_wire.layer_map import LayerMap
from trainer_client.qat.fold import CONVOLUTIONS, value_name
from trainer_client.qat.poles import keep_off_pole
from trainer_client.qat.tail import cuts_of, tail_of

_aten = torch.ops.aten

# Operators whose backward does not need their output and whose output is fresh memory: the injected value may
# be written over it. (ReLU keeps its output, a view shares its input's memory.)
_OVERWRITABLE = CONVOLUTIONS | {
    _aten.linear.default,
    _aten.add.Tensor,
    _aten.mul.Tensor,
    _aten.hardtanh.default,
    _aten.relu6.default,
    _aten.hardswish.default,
}


class TapContext(Protocol):
    """What a tapped graph calls while it runs; its tail calls `tensor` only."""

    def tensor(self, name: str) -> Tensor:
        """The live parameter, buffer or constant of that name."""
        ...

    def inject(self, value: Tensor, layer: int, lower: float, upper: float, overwrite: bool) -> Tensor:
        """Replaces a layer's FP32 value by the NPU's tensor; see `trainer_client.qat.inject.inject`."""
        ...


@dataclass(frozen=True)
class TappedGraph:
    """A training graph for one layer map.

    Attributes:
        module: called as `module(context, *leaves)`; returns the values of the NPU's output layers.
        tail: called as `tail_of` says; returns the model's outputs, flat.
        cuts: nodes of the output layers by position in the layer map; their "val" tells the shape.
        taps: positions of the layers whose tensors it injects.
        missing: names of layers that add noise of their own but have no value of their name in the training
            graph.
    """

    module: fx.GraphModule
    tail: fx.GraphModule
    cuts: Mapping[int, fx.Node]
    taps: tuple[int, ...]
    missing: tuple[str, ...]


def tap(graph: fx.Graph, layer_map: LayerMap) -> TappedGraph:
    """Weaves the injections of a layer map into a folded training graph, which is not changed.

    Raises:
        DeviceFault: the map's outputs are not values of the graph from which its outputs follow.
    """
    cuts = cuts_of(graph, layer_map)
    tail = tail_of(graph, cuts, layer_map)
    tapped = fx.Graph()
    context = tapped.placeholder("context")
    copies: dict[fx.Node, fx.Node] = {}
    tapped.graph_copy(graph, copies)
    tapped.output(tuple(copies[node] for node in cuts.values()))
    tapped.eliminate_dead_code()
    alive = set(tapped.nodes)
    by_name = {value_name(original): copy for original, copy in copies.items() if copy in alive}
    for node in alive:
        if node.op == "get_attr":
            with tapped.inserting_before(node):
                node.replace_all_uses_with(tapped.call_method("tensor", (context, str(node.target))))
            tapped.erase_node(node)
    taps: list[int] = []
    missing: list[str] = []
    scales: dict[fx.Node, float] = {}
    for position, layer in enumerate(layer_map.layers):
        if layer.moves_data_only:
            continue
        if layer.name not in by_name:
            missing.append(layer.name)
        else:
            taps.append(position)
            node = by_name[layer.name]
            keep_off_pole(tapped, node, scales)
            scales[_insert(tapped, context, node, position)] = layer.output.scale
    tapped.lint()
    return TappedGraph(fx.GraphModule({}, tapped), tail, cuts, tuple(taps), tuple(missing))


def _insert(graph: fx.Graph, context: fx.Node, node: fx.Node, position: int) -> fx.Node:
    source, lower, upper = fused_activation(node)
    with graph.inserting_after(node):
        injected = graph.call_method("inject", (context, source, position, lower, upper, _fresh(source)))
    node.replace_all_uses_with(injected, delete_user_cb=lambda user: user is not injected)
    if source is not node:
        graph.erase_node(node)
    return injected


def fused_activation(node: fx.Node) -> tuple[fx.Node, float, float]:
    """The node below an activation that clamps, and its bounds; the node itself and none where it is no such.

    An activation on top of a layer becomes part of the injection: two passes over the tensor less in the
    forward pass, and the injection's mask does the activation's backward.
    """
    lower, upper = _activation_bounds(node)
    source = node.args[0] if lower < upper else None
    if isinstance(source, fx.Node) and len(source.users) == 1 and _fresh(source):
        return source, lower, upper
    return node, -math.inf, math.inf


def _fresh(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _OVERWRITABLE


def _activation_bounds(node: fx.Node) -> tuple[float, float]:
    """Bounds of an activation that clamps, its gradient zero at and beyond its bounds; else (inf, -inf)."""
    if node.target is _aten.relu.default:
        return 0.0, math.inf
    if node.target is _aten.relu6.default:
        return 0.0, 6.0
    if node.target is _aten.hardtanh.default:
        lower, upper = (*node.args[1:], -1.0, 1.0)[:2] if len(node.args) == 1 else (*node.args[1:], 1.0)[:2]
        assert isinstance(lower, int | float)
        assert isinstance(upper, int | float)
        return float(lower), float(upper)
    return math.inf, -math.inf
