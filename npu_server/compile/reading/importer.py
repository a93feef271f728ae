"""Walks an ONNX graph in topological order; what a node means is told by `operators`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto

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
from npu_wire.layer_map import WIRE_TYPES, RawSpec
from npu_wire.tensors import MAX_RANK

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
        self.raw: dict[str, RawSpec] = {}
        self._inputs: list[g.Entry | RawSpec] = []
        self._unusable: dict[str, str] = {}
        self._views: dict[str, View] = {}
        self._operations: list[g.Operation] = []
        self.sequences: dict[str, list[Piece]] = {}
        self.comparisons: set[str] = set()

    def run(self) -> g.Graph:
        """The network as operations.

        Raises:
            InvalidModel, UnsupportedModel: the message names node, operator and reason.
        """
        self._take_inputs()
        live = _live_nodes(self._model)
        for node, alive in zip(self._model.graph.node, live, strict=True):
            if alive and not self.constants.fold(node, self._shape_at):
                self._import(node)
        names = [value.name for value in self._model.graph.output]
        outputs = tuple(dict.fromkeys(self._source(name) for name in names if name not in self.constants))
        operations = _needed(self._operations, outputs)
        if not operations:
            raise UnsupportedModel(f"output {names[0]!r} is computed by no layer of the NPU")
        return g.Graph(tuple(self._inputs), outputs, operations)

    def _source(self, output: str) -> str:
        """The NPU's tensor that an output of the model is a view of."""
        view = self._views.get(output)
        if view is None:
            raise UnsupportedModel(
                self._unusable.get(output, f"output {output!r} is computed by no layer of the NPU")
            )
        return view.name

    def _shape_at(self, name: str, batch: int) -> g.Shape | None:
        raw = self.raw.get(name)
        if raw is not None:
            return (batch, *raw.shape) if raw.batched else raw.shape
        view = self._views.get(name)
        return None if view is None else view.at(batch)

    def _take_inputs(self) -> None:
        """Float inputs with a batch become activations, others stay what they are.

        Where an input has a first dimension without a size, that is the batch, and an input without one has
        no batch dimension. Where none has, each first dimension is taken for the batch.
        """
        values = [value for value in self._model.graph.input if value.name not in self.constants]
        free = any(_is_free(value) for value in values)
        for value in values:
            taken = _taken(value, batched=_is_free(value) or not free)
            if isinstance(taken, str):
                self._unusable[value.name] = taken
                continue
            self._inputs.append(taken)
            if isinstance(taken, g.Entry):
                self._views[taken.name] = View(taken.name, (1, *taken.shape))
            else:
                self.raw[taken.name] = taken
                self._unusable[taken.name] = (
                    f"input {taken.name!r} must be float32 with batch and 1 to 4 more dimensions"
                )

    def _import(self, node: NodeProto) -> None:
        handler = self._handlers.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if handler is None:
            raise refuse(node, "the NPU has no such operator")
        for name in node.input:
            if name in self._unusable:
                raise refuse(node, self._unusable[name])
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


def _needed(operations: list[g.Operation], outputs: tuple[str, ...]) -> tuple[g.Operation, ...]:
    """Those that the outputs derive from: a live node may have operations beside the one that counts."""
    needed, kept = set(outputs), []
    for operation in reversed(operations):
        if operation.output in needed:
            needed.update(operation.inputs)
            kept.append(operation)
    return tuple(reversed(kept))


def _is_free(value: ValueInfoProto) -> bool:
    """Whether an input's first dimension has no size of its own."""
    dims = value.type.tensor_type.shape.dim
    return bool(dims) and not dims[0].HasField("dim_value")


def _taken(value: ValueInfoProto, batched: bool) -> g.Entry | RawSpec | str:
    """How an input is taken, or why it cannot be."""
    tensor = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    batched = batched and bool(dims)
    rest = dims[1:] if batched else dims
    static = tuple(n for n in rest if n is not None and n > 0)
    if len(static) != len(rest):
        return f"input {value.name!r} has shape {dims}; only the batch may be dynamic"
    if math.prod(static) > MAX_ACTIVATION_ELEMENTS:
        return f"input {value.name!r} has shape {dims}; {MAX_ACTIVATION_ELEMENTS} numbers at most"
    if tensor.elem_type == onnx.TensorProto.FLOAT and batched and 1 <= len(static) <= 4:
        return g.Entry(value.name, static)
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    except KeyError:
        dtype = np.dtype(object)
    if dtype not in WIRE_TYPES or len(dims) > MAX_RANK:
        return f"input {value.name!r} must be float32 with batch and 1 to 4 more dimensions"
    return RawSpec(value.name, static, dtype, batched)


def _live_nodes(model: ModelProto) -> list[bool]:
    needed = {value.name for value in model.graph.output}
    live = []
    for node in reversed(model.graph.node):
        alive = any(name in needed for name in node.output)
        if alive:
            needed.update(node.input)
        live.append(alive)
    return live[::-1]
