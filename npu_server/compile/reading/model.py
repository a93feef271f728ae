"""Reads ONNX bytes that nobody has checked."""

from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, TensorProto

from npu_wire.errors import InvalidModel, UnsupportedModel
from npu_wire.tensors import MAX_NAME_LENGTH

MIN_OPSET = 13
MAX_OPSET = 24
MAX_NODES = 20_000


def read_model(data: bytes) -> ModelProto:
    """Parses and checks a model.

    Raises:
        InvalidModel: not ONNX, refused by the ONNX checker (cycles, unknown operators, wrong types), external
            data.
        UnsupportedModel: an opset outside 13..24, local functions, more nodes than any network has.
    """
    try:
        model = onnx.load_from_string(data)
    except (DecodeError, ValueError, TypeError) as error:
        raise InvalidModel(f"the {len(data)} bytes are not an ONNX model: {error}") from error
    _check_initializers(model)
    if len(model.graph.node) > MAX_NODES:
        raise UnsupportedModel(f"model has {len(model.graph.node)} nodes; this NPU takes {MAX_NODES} at most")
    if model.functions:
        raise UnsupportedModel("model has local functions; inline them (onnx.inliner.inline_local_functions)")
    _check_names(model.graph)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker raises a class of its own, and others on malformed messages
        raise InvalidModel(f"ONNX checker refuses the model: {str(error).splitlines()[0]}") from error
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise UnsupportedModel(
            f"model uses opset {opset}; this NPU takes {MIN_OPSET} to {MAX_OPSET}; export it again"
        )
    return model


def _check_initializers(model: ModelProto) -> None:
    # Before the checker runs: with external data it would look for files on this machine.
    for tensor in _tensors(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise InvalidModel(
                f"tensor {tensor.name!r} is stored outside the model; save it without external data"
            )
    if model.graph.sparse_initializer:
        raise InvalidModel("model has sparse initializers; store them dense")


def _check_names(graph: GraphProto) -> None:
    """ONNX's messages let any bytes pass as a name; those of ours, which carry these names on, do not."""
    names = [value.name for value in (*graph.input, *graph.output)]
    names += [tensor.name for tensor in graph.initializer]
    for node in graph.node:
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
    for name in names:
        if not isinstance(name, str) or len(name) > MAX_NAME_LENGTH:
            raise InvalidModel(
                f"name {name[:40]!r} is {len(name)} long; names are UTF-8 text of up to {MAX_NAME_LENGTH} "
                "characters"
            )


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """All tensors, those in branches and bodies as well; protobuf bounds how deep these nest."""
    yield from graph.initializer
    for attribute in (a for node in graph.node for a in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def live_nodes(model: ModelProto) -> list[bool]:
    """Whether each node leads to an output, in the order of the nodes."""
    needed = {value.name for value in model.graph.output}
    live = []
    for node in reversed(model.graph.node):
        alive = any(name in needed for name in node.output)
        if alive:
            needed.update(node.input)
        live.append(alive)
    return live[::-1]
