"""Walks an ONNX graph in topological order; what a node means is told by `operators`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from npu_server.compile import graph as g
from npu_server.compile.reading.constants import (
    FREE_ELEMENTS,
    UNFOLDING,
    Array,
    Constants,
    initializer_arrays,
)
from npu_server.compile.reading.views import View
from npu_wire.errors import UnsupportedModel

MAX_ACTIVATION_ELEMENTS = 1 << 26


class Importer:
    """Walks a model once, in topological order."""

    def __init__(self, model: ModelProto, handlers: Mapping[str, "Handler"]) -> None:
        """Takes a checked model.

        Args:
            model: what `read_model` returned.
            handlers: ONNX operator -> what emits its operation.
        """
        self._model = model
        self._handlers = handlers
        opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self.constants = Constants(initializer_arrays(model), opset)
        self._weights = 0
        self._views: dict[str, View] = {}
        self._operations: list[g.Operation] = []
        self.sequences: dict[str, list[Piece]] = {}
        self.comparisons: set[str] = set()

    def run(self) -> g.Graph:
        """The network as operations.

        Raises:
            InvalidModel, UnsupportedModel: the message names node, operator and reason.
        """
        name, shape = self._input()
        self._views[name] = View(name, (1, *shape))
        if len(self._model.graph.output) != 1:
            raise UnsupportedModel(f"model has {len(self._model.graph.output)} outputs; this NPU takes one")
        live = _live_nodes(self._model)
        for node, alive in zip(self._model.graph.node, live, strict=True):
            if alive and not self.constants.fold(node, self._shape_at):
                self._import(node)
        view = self._views.get(self._model.graph.output[0].name)
        if view is None or view.name == name:
            raise UnsupportedModel(
                f"output {self._model.graph.output[0].name!r} is computed by no layer of the NPU"
            )
        if not view.batch_first:
            raise UnsupportedModel(
                f"output {self._model.graph.output[0].name!r} must have the batch as first dimension"
            )
        return g.Graph(name, shape, view.name, _needed(self._operations, view.name))

    def _shape_at(self, name: str, batch: int) -> g.Shape | None:
        view = self._views.get(name)
        return None if view is None else view.at(batch)

    def _input(self) -> tuple[str, g.Shape]:
        inputs = [value for value in self._model.graph.input if value.name not in self.constants]
        if len(inputs) != 1:
            raise UnsupportedModel(
                f"model has inputs {[v.name for v in inputs]}; this NPU takes one activation input"
            )
        tensor = inputs[0].type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        if tensor.elem_type != onnx.TensorProto.FLOAT or not 2 <= len(dims) <= 5:
            raise UnsupportedModel(
                f"input {inputs[0].name!r} must be float32 with batch and 1 to 4 more dimensions"
            )
        static = [n for n in dims[1:] if n is not None and n > 0]
        if len(static) != len(dims) - 1:
            raise UnsupportedModel(
                f"input {inputs[0].name!r} has shape {dims}; only the batch may be dynamic"
            )
        if math.prod(static) > MAX_ACTIVATION_ELEMENTS:
            raise UnsupportedModel(
                f"input {inputs[0].name!r} has shape {dims}; {MAX_ACTIVATION_ELEMENTS} numbers at most"
            )
        return inputs[0].name, tuple(static)

    def _import(self, node: NodeProto) -> None:
        handler = self._handlers.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if handler is None:
            raise refuse(node, "the NPU has no such operator")
        for name in node.input:
            if not (not name or name in self.constants or name in self._views or name in self.sequences):
                raise refuse(node, f"input {name!r} is no activation that the NPU computes")
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.FLOAT and not math.isfinite(attribute.f):
                raise refuse(node, f"{attribute.name} is {attribute.f}; it must be finite")
        handler(self, node)

    def emit(
        self,
        node: NodeProto,
        inputs: list[str],
        kernel: g.Kernel,
        shape: g.Shape,
        view: View | None = None,
        output: str = "",
    ) -> None:
        """Appends an operation.

        Args:
            node: the node.
            inputs: names of the NPU's tensors that it reads.
            kernel: what it does.
            shape: of the NPU's output, without the batch.
            view: how the ONNX value lies in it; None: with the batch first.
            output: which of the node's outputs it is; the first by default.
        """
        if (
            any(n < 1 for n in shape)
            or int(np.prod([int(n) for n in shape], dtype=object)) > MAX_ACTIVATION_ELEMENTS
        ):
            raise refuse(node, f"its output would have shape {shape}")
        if isinstance(kernel, g.Conv | g.Gemm) and kernel.weights.weight is not None:
            self._take_weights(node, self.constants.array(kernel.weights.weight).size)
        output = output or node.output[0]
        placed = replace(view, name=output) if view is not None else View(output, (1, *shape))
        assert placed.shape == shape
        self._views[output] = placed
        self._operations.append(
            g.Operation(output, tuple(inputs), kernel, shape, (node.name or output,), outer=placed.outer)
        )

    def _take_weights(self, node: NodeProto, size: int) -> None:
        """Each layer packs weights of its own, also where layers share one computed constant."""
        self._weights += size
        if not size or self._weights > self.constants.allowance:
            raise refuse(
                node,
                f"{size} weights; legal are 1 and more, and {FREE_ELEMENTS} + {UNFOLDING} for each that "
                "the model holds in all layers together",
            )

    def emit_like(self, node: NodeProto, inputs: list[str], kernel: g.Kernel, view: View) -> None:
        """Appends an operation whose output lies as a view does."""
        self.emit(node, inputs, kernel, view.shape, view)

    def alias(self, node: NodeProto, view: View, output: str = "") -> None:
        """Makes an output of the node, the first by default, another view of what is computed already."""
        self._views[output or node.output[0]] = view

    def view(self, node: NodeProto, index: int) -> View:
        """An input that must be an activation."""
        view = self._views.get(node.input[index]) if index < len(node.input) else None
        if view is None:
            raise refuse(node, f"input {index} must be an activation")
        return view

    def activation(self, node: NodeProto, index: int) -> tuple[str, g.Shape]:
        """Name and shape of an input that must be an activation with the batch first."""
        view = self.view(node, index)
        if not view.batch_first:
            raise refuse(node, f"input {index} must have the batch as first dimension")
        return view.name, view.shape

    def image(self, node: NodeProto) -> tuple[str, g.Shape]:
        """The first input, which must be an activation of rank 4, or of rank 3 (an image of one row)."""
        name, shape = self.activation(node, 0)
        if len(shape) not in (2, 3):
            raise refuse(node, f"needs (N, C, H, W) or (N, C, L), got (N, {', '.join(map(str, shape))})")
        return name, shape if len(shape) == 3 else (shape[0], 1, shape[1])

    def constant(self, node: NodeProto, index: int, what: str) -> Array | None:
        """Value of an input that must be constant; None where it is left out."""
        if index >= len(node.input) or not node.input[index]:
            return None
        name = node.input[index]
        if name not in self.constants:
            raise refuse(node, f"{what} must be constant")
        if self.constants[name].depends_on_batch:
            raise refuse(node, f"{what} must not depend on the batch size")
        return self.constants.array(name)


Piece = tuple[View | str, int, range, bool]
"""An element of a sequence: what it is cut from, axis, indices, whether the axis (of one index) vanishes."""

Handler = Callable[[Importer, NodeProto], None]


def refuse(node: NodeProto, reason: str) -> UnsupportedModel:
    """The refusal of a node."""
    return UnsupportedModel(f"node {node.name or node.output[0]!r} ({node.op_type}): {reason}")


def attributes(node: NodeProto) -> dict[str, object]:
    """Attributes of a node by name."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _needed(operations: list[g.Operation], output: str) -> tuple[g.Operation, ...]:
    """Those that the output derives from: a live node may have operations beside the one that counts.

    What is left ends with the output's own operation, since it derives from all others.
    """
    needed, kept = {output}, []
    for operation in reversed(operations):
        if operation.output in needed:
            needed.update(operation.inputs)
            kept.append(operation)
    return tuple(reversed(kept))


def _live_nodes(model: ModelProto) -> list[bool]:
    needed = {value.name for value in model.graph.output}
    live = []
    for node in reversed(model.graph.node):
        alive = any(name in needed for name in node.output)
        if alive:
            needed.update(node.input)
        live.append(alive)
    return live[::-1]
