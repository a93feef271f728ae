"""Values of the ONNX graph that depend on weights and shapes only, and on which weights they depend."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from npu_server.compile.reading.single_node import (
    MAX_ELEMENTS,
    Runner,
    is_folded,
    result_size,
    runner,
    single_node_model,
)
from npu_wire.errors import InvalidModel, MissingPackage, NonFiniteInput, UnsupportedModel
from npu_wire.layer_map import Array as Array

FREE_ELEMENTS, UNFOLDING = 1 << 24, 8
"""All computed constants together have at most so many elements, plus so many for each one that the model
itself holds: a small model must not unfold into gigabytes."""

PROBE_BATCHES = (2, 3)
"""Constants that come from a batch size are evaluated at two of them; what differs depends on the batch."""


@dataclass(frozen=True)
class Constant:
    """A value that is known without running the network.

    Attributes:
        values: the array at each of the two `PROBE_BATCHES` (the same object where it does not depend on the
            batch).
        parameters: names of the float initializers that decide about it.
        node: the node that computes it; None for an initializer.
        position: among the node's outputs.
    """

    values: tuple[Array, Array]
    parameters: frozenset[str] = frozenset()
    node: NodeProto | None = None
    position: int = 0

    @property
    def depends_on_batch(self) -> bool:
        """True when it changes with the size of the batch."""
        return self.values[0] is not self.values[1]


class Constants:
    """The constants of one graph with one set of weights."""

    def __init__(self, initializers: Mapping[str, Array], opset: int) -> None:
        """Begins with the initializers.

        Args:
            initializers: name -> array.
            opset: version of the ONNX operators.
        """
        self._opset = opset
        self._held = sum(array.size for array in initializers.values())
        self._computed = 0
        self._runners: dict[tuple[object, ...], Runner] = {}
        self._derived: dict[str, list[str]] = {}  # initializer -> what is computed from it
        self._known = {
            name: Constant((array, array), frozenset([name]) if array.dtype == np.float32 else frozenset())
            for name, array in initializers.items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Constant:
        return self._known[name]

    @property
    def allowance(self) -> int:
        """How many elements may be computed from what the model holds."""
        return FREE_ELEMENTS + UNFOLDING * self._held

    def array(self, name: str) -> Array:
        """The value at the first probe batch; for constants that do not depend on the batch: the value."""
        return self._known[name].values[0]

    def number(self, name: str) -> float:
        """The value of a constant that is one finite number.

        Raises:
            NonFiniteInput: it is NaN or infinite.
        """
        value = float(self.array(name).reshape(-1)[0])
        if not math.isfinite(value):
            raise NonFiniteInput(f"constant {name!r} is {value}; the NPU needs a finite number")
        return value

    def put(self, name: str, array: Array) -> None:
        """Makes an output of a node that needs no evaluation a constant."""
        self._known[name] = Constant((array, array))

    def sample(self, name: str, batch_axis: int | None) -> Array:
        """The value; of one that repeats a sample over the batch, the sample.

        Args:
            name: of the constant.
            batch_axis: its axis that repeats; None: it has none.
        """
        array = self.array(name)
        return array if batch_axis is None else array.take([0], axis=batch_axis)

    def fold(self, node: NodeProto, shape_at: Callable[[str, int], tuple[int, ...] | None]) -> bool:
        """Evaluates a node if it depends on no activation's numbers.

        Args:
            node: any node.
            shape_at: shape of an activation at a size of the batch; None for a name that is none.

        Returns:
            True when the node's outputs are constants now.

        Raises:
            UnsupportedModel: a constant would have more than `MAX_ELEMENTS` elements.
            InvalidModel: the node cannot be evaluated.
        """
        inputs = [name for name in node.input if name]
        if node.op_type in ("Shape", "Size") and inputs[0] not in self._known:
            shapes = [shape_at(inputs[0], batch) for batch in PROBE_BATCHES]
            if shapes[0] is None or shapes[1] is None:
                return False
            # Only shapes count here: a broadcast view stands for the activation without taking its memory.
            a, b = (np.broadcast_to(np.float32(0), shape or ()) for shape in shapes)
            self._known[node.output[0]] = Constant(
                _settled(self._run(node, [a]), self._run(node, [b])), frozenset(), node
            )
            return True
        if node.op_type == "CastLike" and inputs[0] in self._known and inputs[1] not in self._known:
            if shape_at(inputs[1], 1) is None:
                return False
            source = self._known[inputs[0]]
            values = _each(source.values, lambda v: v.astype(np.float32))
            self._known[node.output[0]] = Constant(values, source.parameters, node)
            return True
        if not all(name in self._known for name in inputs) or not is_folded(node):
            return False
        for position, name in enumerate(node.output):
            if not name:
                continue
            constant = self._known[name] = self._evaluate(node, position)
            if node.op_type == "Constant":
                self._held += constant.values[0].size
            else:
                self._computed += sum(value.size for value in {id(v): v for v in constant.values}.values())
        return True

    def branch(self) -> "Constants":
        """The same constants, to `take` other weights; this object stays as it is."""
        if not self._derived:
            for name, constant in self._known.items():  # in the order of evaluation
                for parameter in constant.parameters if constant.node is not None else ():
                    self._derived.setdefault(parameter, []).append(name)
        fresh = Constants({}, self._opset)
        fresh._held, fresh._runners, fresh._derived = self._held, self._runners, self._derived
        fresh._known = dict(self._known)
        return fresh

    def take(self, parameter: str, array: Array, awaited: Collection[str]) -> None:
        """Replaces a float initializer and what derives from it, but for what lacks another one.

        Args:
            parameter: name of the initializer.
            array: its new value.
            awaited: initializers that will be replaced later.
        """
        self._known[parameter] = Constant((array, array), frozenset([parameter]))
        for name in self._derived.get(parameter, ()):
            constant = self._known[name]
            if not constant.parameters.isdisjoint(awaited):
                continue
            assert constant.node is not None
            if constant.node.op_type == "CastLike":
                values = _each(self[constant.node.input[0]].values, lambda v: v.astype(np.float32))
                self._known[name] = Constant(values, constant.parameters, constant.node)
            else:
                self._known[name] = self._evaluate(constant.node, constant.position)

    def _evaluate(self, node: NodeProto, position: int = 0) -> Constant:
        sources = [self._known[name] for name in node.input if name]
        first = self._run(node, [s.values[0] for s in sources], position)
        decides = [] if node.op_type in ("Shape", "Size") else sources
        decides = decides[:1] if node.op_type == "CastLike" else decides  # the other lends its type alone
        varies = any(s.depends_on_batch for s in (decides or sources))
        second = self._run(node, [s.values[1] for s in sources], position) if varies else first
        parameters = frozenset().union(*(s.parameters for s in decides))
        return Constant(_settled(first, second), parameters, node, position)

    def _run(self, node: NodeProto, arrays: list[Array], position: int = 0) -> Array:
        names = [name for name in node.input if name]
        output = node.output[position]
        # Shapes never change with an update: what has run once runs again without being checked or built.
        key = (output, *(array.shape for array in arrays))
        run = self._runners.get(key) or self._checked_runner(node, names, arrays, output)
        if any(self._known[name].parameters for name in names if name in self._known):
            self._runners[key] = run
        try:
            return np.asarray(run(dict(zip(names, arrays, strict=True))))
        except Exception as error:  # the evaluators raise whatever NumPy or ONNX Runtime raise
            raise InvalidModel(f"node {node.name!r} ({node.op_type}) cannot be evaluated: {error}") from error

    def _checked_runner(self, node: NodeProto, names: list[str], arrays: list[Array], output: str) -> Runner:
        """What computes an output of a node on arrays of these shapes, once its size is known to be legal."""
        model = single_node_model(node, names, arrays, output, self._opset)
        size = result_size(node, model, arrays)
        if size > MAX_ELEMENTS or (size > self.allowance - self._computed and node.op_type != "Constant"):
            raise UnsupportedModel(
                f"node {node.name!r} ({node.op_type}): constant of {size} elements; {MAX_ELEMENTS} at most, "
                f"{FREE_ELEMENTS} + {UNFOLDING} for each that the model holds in all constants together"
            )
        try:
            return runner(node, model)
        except MissingPackage:
            raise
        except Exception as error:
            raise InvalidModel(f"node {node.name!r} ({node.op_type}) cannot be evaluated: {error}") from error


def _settled(first: Array, second: Array) -> tuple[Array, Array]:
    """One object where both batches gave one value (the channels in a shape that begins with the batch)."""
    same = first is second or (first.shape == second.shape and np.array_equal(first, second))
    return first, first if same else second


def _each(values: tuple[Array, Array], function: Callable[[Array], Array]) -> tuple[Array, Array]:
    first = function(values[0])
    return (first, first if values[0] is values[1] else function(values[1]))


def initializer_arrays(model: onnx.ModelProto) -> dict[str, Array]:
    """Arrays of all initializers.

    Raises:
        InvalidModel: dimensions and bytes of a tensor do not agree, or it is too large.
    """
    arrays = {}
    for tensor in model.graph.initializer:
        if any(n < 0 for n in tensor.dims) or math.prod(tensor.dims) > MAX_ELEMENTS:
            raise InvalidModel(f"initializer {tensor.name!r} has impossible dimensions {list(tensor.dims)}")
        try:
            array = arrays[tensor.name] = numpy_helper.to_array(tensor)
        except Exception as error:  # to_array raises whatever NumPy raises
            raise InvalidModel(f"initializer {tensor.name!r} cannot be read: {error}") from error
        if array.dtype.kind in "cOSU":
            raise InvalidModel(f"initializer {tensor.name!r} holds {array.dtype}, not real numbers")
    return arrays
