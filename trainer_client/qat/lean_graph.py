"""The training graph as layers that need no forward pass: each begins and ends at tensors of the NPU.

A layer's value is what the NPU sends. What the graph says between two tensors of the NPU is kept for the
backward pass, and for measuring noise. Arithmetic on weights alone (folded batch norm, parametrizations)
stays ordinary operations, so that gradients go through it as everywhere in torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from npu_wire.layer_map import LayerMap
from trainer_client.qat.fold import value_name
from trainer_client.qat.poles import keep_off_pole
from trainer_client.qat.tail import cuts_of, shape_at, tail_of
from trainer_client.qat.taps import TappedGraph, fused_activation

_aten = torch.ops.aten


@dataclass(frozen=True)
class Convolution:
    """A layer that is one convolution; all but `geometry` are positions among its operands.

    Attributes:
        source: its input, a tensor of the NPU.
        weight: its weight.
        bias: its bias, if any.
        geometry: strides, padding, dilation, groups.
    """

    source: int
    weight: int
    bias: int | None
    geometry: tuple[Any, ...]


@dataclass(frozen=True)
class Product:
    """A layer that is `aten.linear`; attributes as of `Convolution`."""

    source: int
    weight: int
    bias: int | None


@dataclass(frozen=True)
class Addition:
    """A layer that adds two of its operands, `first` and `second`."""

    first: int
    second: int


@dataclass(frozen=True)
class LeanLayer:
    """What is between the tensors of the NPU that a layer reads and the one that it yields.

    Attributes:
        position: in the layer map.
        node: of the training graph; its "val" tells the shape of the value.
        graph: from the operands to the value before the activation that the bounds stand for.
        form: the operator whose backward pass is called directly; None: recomputed under autograd.
        lower: bound of the activation, as in `InjectionRule`.
        upper: the same.
    """

    position: int
    node: fx.Node
    graph: fx.Graph
    form: Convolution | Product | Addition | None
    lower: float
    upper: float

    def shape(self, samples: int) -> tuple[int, ...]:
        """Of the value, for a batch of so many samples."""
        if samples not in self._shapes:
            self._shapes[samples] = shape_at(self.node, samples)
        return self._shapes[samples]

    @cached_property
    def _shapes(self) -> dict[int, tuple[int, ...]]:
        return {}

    @cached_property
    def compute(self) -> fx.GraphModule:
        """The graph as a function of the operands."""
        return fx.GraphModule({}, self.graph)


@dataclass(frozen=True)
class LeanGraph(TappedGraph):
    """A tapped graph whose module calls `layer` and `value` of its context; see `LeanPass`.

    Attributes:
        layers: by position in the layer map.
    """

    layers: Mapping[int, LeanLayer]


def thin(graph: fx.Graph, layer_map: LayerMap) -> LeanGraph:
    """Makes layers of a folded training graph, which is not changed.

    Raises:
        DeviceFault: the map's outputs are not values of the graph from which its outputs follow.
    """
    cuts = cuts_of(graph, layer_map)
    alive = _sources_of(cuts.values())
    by_name = {value_name(node): node for node in graph.nodes if node in alive}
    own = [(i, layer.name) for i, layer in enumerate(layer_map.layers) if not layer.moves_data_only]
    tapped = {by_name[name]: position for position, name in own if name in by_name}
    missing = tuple(name for _, name in own if name not in by_name)
    scales = {node: layer_map.layers[position].output.scale for node, position in tapped.items()}
    thinner = _Thinner(graph, tapped, scales)
    module = thinner.run(alive, list(cuts.values()))
    taps = tuple(sorted(tapped.values()))
    return LeanGraph(module, tail_of(graph, cuts, layer_map), cuts, taps, missing, thinner.layers)


class _Thinner:
    def __init__(
        self, graph: fx.Graph, tapped: Mapping[fx.Node, int], scales: Mapping[fx.Node, float]
    ) -> None:
        self._graph = graph
        self._tapped = tapped
        self._scales = scales
        self._active: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder" or not self._active.isdisjoint(node.all_input_nodes):
                self._active.add(node)
        self._new = fx.Graph()
        self._context = self._new.placeholder("context")
        self._made: dict[fx.Node, fx.Node] = {}
        self._values: dict[fx.Node, fx.Node] = {}
        self.layers: dict[int, LeanLayer] = {}

    def run(self, alive: set[fx.Node], cuts: list[fx.Node]) -> fx.GraphModule:
        for node in self._graph.find_nodes(op="placeholder"):
            self._made[node] = self._new.placeholder(node.name)
        for node in self._graph.nodes:
            if node in alive and node in self._tapped:
                self._insert(node, self._tapped[node])
        self._new.output(tuple(self._value(node) for node in cuts))
        self._new.lint()
        return fx.GraphModule({}, self._new)

    def _insert(self, node: fx.Node, position: int) -> None:
        inner, lower, upper = fused_activation(node)
        if inner in self._tapped:  # it has a tensor of its own
            inner, lower, upper = node, -math.inf, math.inf
        region = fx.Graph()
        operands: dict[fx.Node, fx.Node] = {}
        copies: dict[fx.Node, fx.Node] = {}
        inside = self._inside(inner)
        for operand in dict.fromkeys(x for each in inside for x in each.all_input_nodes if x not in inside):
            operands[operand] = region.placeholder(f"operand_{len(operands)}")
        for each in inside:
            copies[each] = region.node_copy(each, {**operands, **copies}.__getitem__)
        region.output(copies[inner])
        scales = {operands[node]: self._scales[node] for node in operands if node in self._scales}
        keep_off_pole(region, copies[inner], scales)
        order = {operand: i for i, operand in enumerate(operands)}
        form = _form_of(inner, order, self._active) if len(inside) == 1 else None
        self.layers[position] = LeanLayer(position, node, region, form, lower, upper)
        arguments = [self._operand(operand) for operand in operands]
        self._made[node] = self._new.call_method("layer", (self._context, position, *arguments))

    def _inside(self, inner: fx.Node) -> dict[fx.Node, None]:
        """Nodes on the way to a value from the tensors of the NPU, inputs and weights, in order."""
        found, waiting = {inner}, [inner]
        while waiting:
            for source in waiting.pop().all_input_nodes:
                known = source in found or source in self._tapped or source.op == "placeholder"
                if source in self._active and not known:
                    found.add(source)
                    waiting.append(source)
        return {node: None for node in self._graph.nodes if node in found}

    def _operand(self, node: fx.Node) -> fx.Node:
        """A tensor of the NPU or an input as it is made already; else arithmetic on weights."""
        if node not in self._made:
            self._made[node] = self._copied(node)
        return self._made[node]

    def _value(self, node: fx.Node) -> fx.Node:
        """The real numbers of any node."""
        if node not in self._values:
            held = node in self._tapped or node.op == "placeholder"
            self._values[node] = (
                self._new.call_method("value", (self._context, self._made[node]))
                if held
                else self._copied(node)
            )
        return self._values[node]

    def _copied(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            return self._new.call_method("tensor", (self._context, str(node.target)))
        copy = self._value if node in self._active else self._operand
        sources = {source: copy(source) for source in node.all_input_nodes}
        return self._new.node_copy(node, sources.__getitem__)


def _sources_of(nodes: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _form_of(
    node: fx.Node, order: Mapping[fx.Node, int], active: set[fx.Node]
) -> Convolution | Product | Addition | None:
    """The form of a layer that is this one node; None where its backward pass is autograd's."""
    args: tuple[Any, ...] = node.args
    if node.kwargs or not args or args[0] not in active:
        return None
    if node.target is _aten.add.Tensor:
        both = len(args) == 2 and args[1] in active
        return Addition(order[args[0]], order[args[1]]) if both else None
    if len(args) < 2 or not active.isdisjoint(args[1:3]):
        return None
    if node.target is _aten.linear.default:
        source, weight, bias = (*args, None)[:3]
        return Product(order[source], order[weight], order.get(bias))
    if node.target is _aten.conv2d.default:
        given = [*args, *_CONV2D[len(args) :]]
        source, weight, bias, geometry = *given[:3], tuple(given[3:])
        return Convolution(order[source], order[weight], order.get(bias), geometry)
    return None


_CONV2D = (None, None, None, [1, 1], [0, 0], [1, 1], 1)  # what its arguments are where they are not given
