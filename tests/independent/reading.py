"""Float ONNX models as nodes on activations: ONNX Runtime evaluates the constants and tells the shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper

_LOOK_AT_SHAPES = ("Shape", "Size")
_SAME_VALUE = ("Identity", "Dropout", "Cast", "CastLike")
_SAME_ELEMENTS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Node:
    """One node on activations; `inputs` are its activations, `constants` its other inputs by position."""

    op: str
    output: str
    inputs: tuple[str, ...]
    constants: Mapping[int, np.ndarray]
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class FloatNetwork:
    """A float network that was run once.

    Attributes:
        input: name.
        output: name of the activation that is the network's output.
        nodes: those that the output needs, in order.
        shapes: of every activation, batch included.
        ranges: smallest and largest value of every activation in that run.
        uses: how often each activation is read; the network's output once more.
    """

    input: str
    output: str
    nodes: tuple[Node, ...]
    shapes: Mapping[str, tuple[int, ...]]
    ranges: Mapping[str, tuple[float, float]]
    uses: Mapping[str, int]


def plain_session(model: bytes) -> onnxruntime.InferenceSession:
    """A session that computes node by node, without any fusion."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options)


def read(model: bytes, images: np.ndarray) -> FloatNetwork:
    """Runs a float model on some images and keeps what is known of it then."""
    proto = ModelProto.FromString(model)
    graph, output = proto.graph, proto.graph.output[0].name
    values: dict[str, np.ndarray] = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    source = next(value.name for value in graph.input if value.name not in values)
    del graph.output[:]
    names = [name for node in graph.node for name in node.output if name]
    graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    results = plain_session(proto.SerializeToString()).run(None, {source: images})
    values |= {source: images} | dict(zip(names, results, strict=True))

    alias, nodes = {source: source}, []
    for node in graph.node:
        activations = [alias[name] for name in _data_inputs(node) if name in alias]
        if not activations:
            continue
        result = node.output[0]
        if node.op_type in _SAME_VALUE or (
            node.op_type in _SAME_ELEMENTS and values[result].shape == values[activations[0]].shape
        ):
            alias[result] = activations[0]
            continue
        alias[result] = result
        constants = {i: values[n] for i, n in enumerate(node.input) if n and n not in alias}
        fields = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        nodes.append(Node(node.op_type, result, tuple(activations), constants, fields))
    live = _needed(nodes, alias[output])
    uses = {alias[output]: 1}
    for node in live:
        for name in node.inputs:
            uses[name] = uses.get(name, 0) + 1
    kept = [source, *(node.output for node in live)]
    return FloatNetwork(
        source,
        alias[output],
        tuple(live),
        {name: values[name].shape for name in kept},
        {name: (float(values[name].min()), float(values[name].max())) for name in kept},
        uses,
    )


def write(network: FloatNetwork) -> bytes:
    """The network without what an exporter leaves around it: every constant is an initializer."""
    nodes, constants = [], {}
    for node in network.nodes:
        activations = iter(node.inputs)
        names = []
        for index in range(max(len(node.inputs) + len(node.constants), *(i + 1 for i in node.constants), 1)):
            if index in node.constants:
                names.append(f"{node.output}/{index}")
                constants[names[-1]] = node.constants[index]
            else:
                names.append(next(activations, ""))
        nodes.append(helper.make_node(node.op, names, [node.output], node.output, **node.fields))
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(network.input, TensorProto.FLOAT, network.shapes[network.input])],
        [helper.make_tensor_value_info(network.output, TensorProto.FLOAT, network.shapes[network.output])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def _data_inputs(node: onnx.NodeProto) -> list[str]:
    """Inputs whose numbers decide about the node's result."""
    if node.op_type in _LOOK_AT_SHAPES:
        return []
    return list(node.input[:1] if node.op_type == "CastLike" else node.input)


def _needed(nodes: list[Node], output: str) -> list[Node]:
    wanted, live = {output}, []
    for node in reversed(nodes):
        if node.output in wanted:
            wanted.update(node.inputs)
            live.append(node)
    return live[::-1]
