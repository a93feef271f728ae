"""Walks an ONNX graph in topological order; what a node means is told by `operators`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from npu_server.compile import graph as g
from npu_server.compile.reading.constants import (
    FREE_ELEMENTS,
    PROBE_BATCHES,
    UNFOLDING,
    Array,
    Constants,
    initializer_arrays,
)
from npu_server.compile.reading.host_region import MOVING, HostRegion, Ranges, is_narrow
from npu_server.compile.reading.inputs import MAX_ACTIVATION_ELEMENTS, no_activation, taken_inputs
from npu_server.compile.reading.losses import tensors_of_a_loss
from npu_server.compile.reading.model import live_nodes
from npu_server.compile.reading.views import View
from npu_wire.errors import NotCalibrated, NpuError, UnsupportedModel
from npu_wire.layer_map import RawSpec

_REMEDY = (
    "Write it with other operators, compute it outside of the model, or let the NPU's host run it "
    "(`unsupported` in its profile)"
)


class _Excess(Exception):
    """More than any machine should be asked for, the host neither."""


@dataclass(frozen=True)
class HostRules:
    """What the NPU's host takes over.

    Attributes:
        takes: whether it runs an operator that the NPU refuses.
        ranges: of the activations that the client knows; only those can be brought to the NPU, or be taken
            from it. None: every activation has one.
        refused: outputs of nodes that turned out to be none of the NPU's only when layers were planned, and
            why (UnsupportedModel, NotCalibrated).
        innermost: values of the host in which the samples are the inner part of the axis that they share with
            others, as where parts of a network are concatenated along the batch.
    """

    takes: Callable[[str], bool] = lambda operator: False
    ranges: Ranges | None = None
    refused: Mapping[str, NpuError] = field(default_factory=dict)
    innermost: frozenset[str] = frozenset()


class Importer:
    """Walks a model once, in topological order."""

    def __init__(
        self, model: ModelProto, handlers: Mapping[str, "Handler"], rules: HostRules | None = None
    ) -> None:
        """Takes a checked model.

        Args:
            model: what `read_model` returned.
            handlers: ONNX operator -> what emits its operation.
            rules: what may go to the host; None: nothing.
        """
        self._rules = rules or HostRules()
        self._model = model
        self._handlers = handlers
        opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self.constants = Constants(initializer_arrays(model), opset)
        self._weights = 0
        self.raw: dict[str, RawSpec] = {}
        self._raw_types: dict[str, tuple[onnx.TypeProto, onnx.TypeProto]] = {}
        self._inputs: list[g.Entry | RawSpec] = []
        self._unusable: dict[str, str] = {}
        self._views: dict[str, View] = {}
        self._operations: list[g.Operation] = []
        self.sequences: dict[str, list[Piece]] = {}
        self.comparisons: set[str] = set()
        self._refusals: dict[str, NpuError] = {}
        self._of_masks: set[str] = set()
        self._of_losses: set[str] = set()
        self._computed: dict[str, g.Operation] = {}
        self._host = HostRegion(
            model, self.constants, self._views, self._raw_types, self._is_comparison, self._rules.innermost
        )

    def run(self) -> g.Graph:
        """The network as operations.

        Raises:
            InvalidModel, UnsupportedModel: the message names node, operator and reason.
        """
        self._take_inputs()
        live = live_nodes(self._model)
        for node, alive in zip(self._model.graph.node, live, strict=True):
            if alive and not self._fold(node):
                self._import(node)
        outputs, operations = self._needed([value.name for value in self._model.graph.output])
        if not operations:
            first = next(iter(self._refusals.values()), None)
            if isinstance(first, NotCalibrated):
                raise first
            why = first or f"output {self._model.graph.output[0].name!r} is computed by no layer of the NPU"
            raise UnsupportedModel(
                f"{why}. Nothing is left for the NPU: a model needs an operator that it has"
            )
        return g.Graph(tuple(self._inputs), outputs, operations)

    def _fold(self, node: NodeProto) -> bool:
        """Makes what depends on no activation's numbers a constant."""
        if node.op_type == "CastLike" and node.input[1] not in self._views:
            # To the type of what is no float activation.
            return node.input[1] in self.constants and self.constants.fold(node, self._shape_at)
        return self.constants.fold(node, self._shape_at)

    def _needed(self, names: list[str]) -> tuple[tuple[str, ...], tuple[g.Operation, ...]]:
        """The tensors that the model's outputs follow from, and the operations that these derive from.

        What the host would compute last is the tail: it is left to the client, which begins with the tensors
        that it knows.
        """
        names = [name for name in names if name not in self.constants]
        own = [self._views[n].name for n in names if n in self._views and not self._is_of_host(n)]
        tail = [name for name in names if name not in self._views or self._is_of_host(name)]
        outputs, operations = self._settled(own, tail)
        entries = [entry.name for entry in self._inputs if isinstance(entry, g.Entry)]
        self._of_losses = tensors_of_a_loss(operations, entries, own)
        return self._settled(own, tail) if self._of_losses else (outputs, operations)

    def _settled(self, own: list[str], tail: list[str]) -> tuple[tuple[str, ...], tuple[g.Operation, ...]]:
        """The tensors `own`, and those that the values `tail` follow from; and their operations."""
        outputs: tuple[str, ...] = ()
        operations: tuple[g.Operation, ...] = ()
        for _ in range(3):  # a tail may begin with what a host part has yielded; that settles at once
            there = {x.output for x in operations if isinstance(x.operator, g.HostPart)}
            sources = self._tail_sources(tail, there)
            if operations and tuple(dict.fromkeys((*own, *sources))) == outputs:
                break
            outputs = tuple(dict.fromkeys((*own, *sources)))
            operations = self._derive(outputs)
        return outputs, operations

    def _tail_sources(self, names: list[str], there: set[str]) -> list[str]:
        known = self._rules.ranges

        def stops(name: str) -> bool:
            if self._is_of_host(name) and self._origin(name) not in there:
                return False
            tensor = self._views[name].name
            if tensor in self._of_losses:
                return False
            return tensor not in self.comparisons and (known is None or tensor in known)

        return [view.name for view in self._host.trace(names, stops).views.values()]

    def _derive(self, outputs: tuple[str, ...]) -> tuple[g.Operation, ...]:
        """The operations that tensors derive from: a live node may have some beside the one that counts."""
        needed, kept = set(outputs), []
        for operation in reversed(self._operations):
            if operation.output not in needed:
                continue
            if operation.output in self._host.values:
                view = self._views[operation.output]
                operation = self._host.part(operation.output, view, self._can_leave)
            needed.update(operation.inputs)
            kept.append(operation)
        return tuple(reversed(kept))

    def _origin(self, name: str) -> str:
        """The tensor of which an activation is the same numbers, in another shape or order."""
        tensor = self._views[name].name
        while tensor in self._computed and isinstance(self._computed[tensor].operator, _MOVES_DATA):
            tensor = self._computed[tensor].inputs[0]
        return tensor

    def _is_of_host(self, name: str) -> bool:
        """Whether the host computed the numbers of an activation."""
        return self._origin(name) in self._host.values

    def _can_leave(self, name: str) -> bool:
        """Whether an activation is an INT8 tensor of the NPU's own, which the host can begin with."""
        tensor, known = self._origin(name), self._rules.ranges
        if tensor in self._host.values or tensor in self.comparisons or tensor in self._of_masks:
            return False
        return known is None or tensor in known or tensor not in self._computed

    def _is_comparison(self, name: str) -> bool:
        return self._views[name].name in self.comparisons

    def _shape_at(self, name: str, batch: int) -> g.Shape | None:
        raw = self.raw.get(name)
        if raw is not None:
            return (batch, *raw.shape) if raw.batched else raw.shape
        view = self._views.get(name)
        if view is None and name in self._host.values:
            return self._host.shape_at(name, batch)
        return None if view is None else view.at(batch)

    def _take_inputs(self) -> None:
        for value, taken in taken_inputs(self._model, self.constants):
            if isinstance(taken, str):
                self._unusable[value.name] = taken
                continue
            self._inputs.append(taken)
            if isinstance(taken, g.Entry):
                self._views[taken.name] = View(taken.name, (1, *taken.shape))
            else:
                self.raw[taken.name] = taken
                first, second = (self._shape_at(taken.name, batch) or () for batch in PROBE_BATCHES)
                element = value.type.tensor_type.elem_type
                self._raw_types[taken.name] = (
                    onnx.helper.make_tensor_type_proto(element, first),
                    onnx.helper.make_tensor_type_proto(element, second),
                )
                self._unusable[taken.name] = no_activation(taken.name)

    def _import(self, node: NodeProto) -> None:
        """A node becomes operations of the NPU, or else a part of what its host computes."""
        before, weights = len(self._operations), self._weights
        try:
            self._on_npu(node)
        except _Excess as error:
            raise UnsupportedModel(str(error)) from error
        except (UnsupportedModel, NotCalibrated) as error:
            undone = [operation.output for operation in self._operations[before:]]
            del self._operations[before:]
            self._weights = weights
            for name in (*node.output, *undone):
                self._views.pop(name, None)
                self._computed.pop(name, None)
                self.comparisons.discard(name)
            at_host = any(name in self._host.values for name in node.input)
            if not self._rules.takes(node.op_type) and not (at_host and node.op_type in self._handlers):
                if isinstance(error, NotCalibrated):
                    raise
                raise UnsupportedModel(f"{error}. {_REMEDY}") from error
            if not at_host:
                self._refusals[node.output[0]] = error
            self._host.take(node, str(error))

    def _on_npu(self, node: NodeProto) -> None:
        handler = self._handlers.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if handler is None:
            raise refuse(node, "the NPU has no such operator")
        for name in node.output:
            if name in self._rules.refused:
                raise self._rules.refused[name]
        for name in node.input:
            if name in self._unusable:
                raise refuse(node, self._unusable[name])
            if name in self._host.values and name not in self._views and name not in self.constants:
                self._bring(node, name)
            if not (not name or name in self.constants or name in self._views or name in self.sequences):
                raise refuse(node, f"input {name!r} is no activation that the NPU computes")
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.FLOAT and not math.isfinite(attribute.f):
                raise refuse(node, f"{attribute.name} is {attribute.f}; it must be finite")
        handler(self, node)
        for name in node.output:
            if name in self._views and not is_narrow(name, self._rules.ranges) and self._is_mask(name):
                raise refuse(node, "it makes a mask, whose numbers would take all steps of INT8")

    def _is_mask(self, name: str) -> bool:
        """Whether an activation is arithmetic on values of the host alone; if so, the host does all of it."""
        waiting, made = [self._views[name].name], set[str]()
        while waiting:
            tensor = waiting.pop()
            if tensor in self._host.values:
                continue
            operation = self._computed.get(tensor)
            if operation is None or not isinstance(operation.operator, _ARITHMETIC):
                return False
            made.add(tensor)
            waiting += operation.inputs
        self._of_masks |= made
        return True

    def _bring(self, node: NodeProto, name: str) -> None:
        """Makes a value of the host an INT8 tensor of the NPU."""
        known = self._rules.ranges
        if node.op_type in MOVING and known is not None and set(node.output) <= known.keys():
            raise refuse(node, "the host moves what is its own")  # the NPU gets it where it computes
        view = self._host.view(name, known)
        self._views[name] = view
        placeholder = g.HostPart(b"", (), (), (), 0, "", "")  # made when it is clear that it is needed
        self._operations.append(g.Operation(name, (), placeholder, view.shape, (), outer=view.outer))

    def emit(
        self,
        node: NodeProto,
        inputs: list[str],
        operator: g.Operator,
        shape: g.Shape,
        view: View | None = None,
        output: str = "",
    ) -> None:
        """Appends an operation.

        Args:
            node: the node.
            inputs: names of the NPU's tensors that it reads.
            operator: what it does.
            shape: of the NPU's output, without the batch.
            view: how the ONNX value lies in it; None: with the batch first.
            output: which of the node's outputs it is; the first by default.
        """
        if (
            any(n < 1 for n in shape)
            or int(np.prod([int(n) for n in shape], dtype=object)) > MAX_ACTIVATION_ELEMENTS
        ):
            raise refuse(node, f"its output would have shape {shape}")
        if isinstance(operator, g.Conv | g.Gemm) and operator.weights.weight is not None:
            self._take_weights(node, self.constants.array(operator.weights.weight).size)
        output = output or node.output[0]
        placed = replace(view, name=output) if view is not None else View(output, (1, *shape))
        assert placed.shape == shape
        self._views[output] = placed
        operation = g.Operation(
            output, tuple(inputs), operator, shape, (node.name or output,), outer=placed.outer
        )
        self._operations.append(operation)
        self._computed[output] = operation

    def _take_weights(self, node: NodeProto, size: int) -> None:
        """Each layer packs weights of its own, also where layers share one computed constant."""
        self._weights += size
        if not size or self._weights > self.constants.allowance:
            raise _Excess(
                str(
                    refuse(
                        node,
                        f"{size} weights; legal are 1 and more, and {FREE_ELEMENTS} + {UNFOLDING} for each "
                        "that the model holds in all layers together",
                    )
                )
            )

    def emit_like(self, node: NodeProto, inputs: list[str], operator: g.Operator, view: View) -> None:
        """Appends an operation whose output lies as a view does."""
        self.emit(node, inputs, operator, view.shape, view)

    def alias(self, node: NodeProto, view: View, output: str = "") -> None:
        """Makes an output of the node, the first by default, another view of what is computed already."""
        self._views[output or node.output[0]] = view

    def named(self, name: str) -> View:
        """What an operation has been emitted as."""
        return self._views[name]

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

    def names_first(self, node: NodeProto, view: View) -> bool:
        """Whether a node's output has a range, and the tensor that it shows has none."""
        known = self._rules.ranges
        return known is not None and node.output[0] in known and view.name not in known

    def leads_to(self, node: NodeProto, op: str) -> bool:
        """Whether an operator alone reads what a node yields, perhaps in another shape."""
        followers = [other for other in self._model.graph.node if node.output[0] in other.input]
        if len(followers) != 1 or followers[0].op_type not in ("Reshape", op):
            return False
        return followers[0].op_type == op or self.leads_to(followers[0], op)

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


_ARITHMETIC = g.Add | g.Sub | g.Mul | g.Affine | g.Clamp | g.Function | g.Reshape | g.Rearrange | g.Select
"""What masks are made with."""

_MOVES_DATA = g.MaxPool | g.Largest | g.Reshape | g.Rearrange | g.Select | g.Pad | g.Interpolate
"""Their output has its input's scale, and needs no range of its own."""

Piece = tuple[View | str, int, range, bool]
"""An element of a sequence: what it is cut from, axis, indices, whether the axis (of one index) vanishes."""

Handler = Callable[[Importer, NodeProto], None]


def refuse(node: NodeProto, reason: str) -> UnsupportedModel:
    """The refusal of a node."""
    return UnsupportedModel(f"node {node.name or node.output[0]!r} ({node.op_type}): {reason}")


def attributes(node: NodeProto) -> dict[str, object]:
    """Attributes of a node by name."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
