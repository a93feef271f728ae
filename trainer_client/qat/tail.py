"""The tail of a training graph: what follows the NPU's last tensors and is nothing that the NPU does.

A loss inside the model, box decoding, an output that is passed through: the client computes them in FP32
from the NPU's dequantized tensors. Training and evaluation run the very same tail on tensors of equal bits
in equal memory order, so their results are equal bit for bit. An input that the NPU quantizes is dequantized
for the tail's operations as well; one that is passed through, or that only the tail reads, is the user's own.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import fx

from npu_wire.errors import DeviceFault
from npu_wire.layer_map import LayerMap
from trainer_client.qat.fold import value_name


def cuts_of(graph: fx.Graph, layer_map: LayerMap) -> dict[int, fx.Node]:
    """The nodes of the layers from which the outputs follow, by position in the layer map.

    Raises:
        DeviceFault: the graph has no value of that name.
    """
    by_name = {value_name(node): node for node in graph.nodes}
    cuts = {}
    for position in sorted(layer_map.output_layers):
        name = layer_map.layers[position].name
        if name not in by_name:
            raise DeviceFault(
                f"the output {name!r} that the NPU reports is no value of the model; this backend does not "
                "keep the names of the ONNX values"
            )
        cuts[position] = by_name[name]
    return cuts


def tail_of(graph: fx.Graph, cuts: Mapping[int, fx.Node], layer_map: LayerMap) -> fx.GraphModule:
    """The tail as `module(context, *tensors, *seen, *leaves)`.

    These are the tensors of the cuts in their order, the dequantized inputs that `seen_by_tail` names, and
    the call's leaves.

    Args:
        graph: folded training graph; not changed.
        cuts: what `cuts_of` returned.
        layer_map: of the program.

    Raises:
        DeviceFault: a layer of the NPU lies behind the cuts.
    """
    (output,) = graph.find_nodes(op="output")
    needed = _needed(output, set(cuts.values()))
    layers = {layer.name for layer in layer_map.layers if not layer.moves_data_only}
    for node in needed - set(cuts.values()):
        if value_name(node) in layers:
            raise DeviceFault(
                f"the NPU computes {value_name(node)!r}, from which the model's output follows, but does not "
                f"name it among its outputs {list(layer_map.outputs)}"
            )
    tail = fx.Graph()
    context = tail.placeholder("context")
    made = {node: tail.placeholder(f"npu_{position}") for position, node in cuts.items()}
    seen = {name: tail.placeholder(f"seen_{i}") for i, name in enumerate(seen_by_tail(layer_map))}
    passed = dict(made)
    for node in graph.find_nodes(op="placeholder"):
        passed[node] = tail.placeholder(f"leaf_{node.name}")
        made[node] = seen.get(value_name(node), passed[node])
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr" and node in needed:
            made[node] = tail.call_method("tensor", (context, str(node.target)))
        elif node in needed and node not in made and node is not output:
            made[node] = tail.node_copy(node, made.__getitem__)
    tail.output(fx.map_arg(output.args[0], lambda node: passed.get(node, made[node])))
    tail.lint()
    return fx.GraphModule({}, tail)


def seen_by_tail(layer_map: LayerMap) -> tuple[str, ...]:
    """The quantized inputs among the tensors from which the outputs follow."""
    return tuple(spec.name for spec in layer_map.quantized_inputs if spec.name in layer_map.outputs)


def _needed(output: fx.Node, cuts: set[fx.Node]) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    waiting = [output]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [] if node in cuts else node.all_input_nodes
    return needed


def shape_at(node: fx.Node, samples: int) -> tuple[int, ...]:
    """Shape of a node's value for a batch of so many samples."""
    return tuple(_size(size, samples) for size in node.meta["val"].shape)


def _size(size: int | torch.SymInt, samples: int) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, samples)))


def in_one_order(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Row-major: float operations may round otherwise in another memory order."""
    return [tensor.contiguous() for tensor in tensors]
