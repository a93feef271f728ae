"""ONNX nodes that the NPU cannot run: what their values look like, and the float models that its host runs.

Nothing is computed here. Types and shapes come from ONNX's own inference, one node at a time, at each of the
probe batches.
"""

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from npu_server.compile import graph as g
from npu_server.compile.reading.constants import PROBE_BATCHES, Array, Constants
from npu_server.compile.reading.host_work import multiplications
from npu_server.compile.reading.single_node import RANDOM
from npu_server.compile.reading.views import View
from npu_wire.errors import UnsupportedModel

MAX_ELEMENTS = 1 << 26
"""Of one value on the host, at the larger probe batch."""

MAX_PART_NODES = 50_000
"""Of all parts of a model together: what several parts need is in each of them."""

_WIDEST = 1e4
"""A value beyond is arithmetic of masks, minus infinity in disguise: INT8 codes would lose all the rest."""

_KNOWN_DATA = 4096  # elements of a constant that shape inference, and ONNX Runtime's, may look at

_NAMED_OPERATORS = 6

MOVING = frozenset(
    ["Cast", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"]
)
"""ONNX operators that show elements in another way."""

Ranges = Mapping[str, tuple[float, float]]
Types = tuple[TypeProto | None, TypeProto | None]


@dataclass(frozen=True)
class HostValue:
    """A value that the host would compute.

    Attributes:
        types: at each of `PROBE_BATCHES`; None where only the data tells.
        problem: why the host cannot compute it; empty where it can.
    """

    types: Types
    problem: str


@dataclass(frozen=True)
class Trace:
    """What a value derives from.

    Attributes:
        nodes: in topological order.
        views: activations of the NPU: ONNX name -> view.
        raw: inputs that travel as they are.
        constants: that are known whatever the batch.
        sizes: shapes that follow from the batch alone: name -> (shape at batch 0, growth with each sample).
        unknown: an input of the model that does not travel; empty where there is none.
    """

    nodes: tuple[NodeProto, ...]
    views: Mapping[str, View]
    raw: tuple[str, ...]
    constants: tuple[str, ...]
    sizes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unknown: str


class HostRegion:
    """The nodes that are the host's, and what is known of their values."""

    def __init__(
        self,
        model: ModelProto,
        constants: Constants,
        views: Mapping[str, View],
        raw: Mapping[str, tuple[TypeProto, TypeProto]],
        is_bool: Callable[[str], bool],
        innermost: Container[str] = (),
    ) -> None:
        """Takes what the importer knows, and looks into it while that grows.

        Args:
            model: the model.
            constants: its constants.
            views: activations of the NPU.
            raw: types of the inputs that travel as they are.
            is_bool: tells which activations are comparisons.
            innermost: values in which the samples are the inner part of the axis that they share with others.
        """
        self._model = model
        self._constants = constants
        self._views = views
        self._raw = raw
        self._is_bool = is_bool
        self._innermost = innermost
        self._opset = [o for o in model.opset_import if o.domain in ("", "ai.onnx")]
        self._producer = {
            name: (i, node) for i, node in enumerate(model.graph.node) for name in node.output if name
        }
        self.values: dict[str, HostValue] = {}
        self._reasons: dict[str, str] = {}
        self._nodes_of_parts = 0

    def take(self, node: NodeProto, reason: str) -> None:
        """Gives a node to the host; `reason` says why the NPU does not run it."""
        self._reasons[node.output[0]] = reason
        inferred = [self._inferred(node, i) for i in range(len(PROBE_BATCHES))]
        problem = _problem(node) or next(
            (self.values[name].problem for name in node.input if self._problem_of(name)), ""
        )
        for name in (name for name in node.output if name):
            types = inferred[0].get(name), inferred[1].get(name)
            self.values[name] = HostValue(types, problem or _shape_problem(node, types))

    def shape_at(self, name: str, batch: int) -> g.Shape | None:
        """Shape of one of the region's values; None where it is not known."""
        types = self.values[name].types
        first, second = (None if t is None else _dims(t) for t in types)
        if first is None or second is None or len(first) != len(second):
            return None
        return tuple(a + (batch - PROBE_BATCHES[0]) * (b - a) for a, b in zip(first, second, strict=True))

    def view(self, name: str, ranges: Ranges | None) -> View:
        """How a value of the host would lie on the NPU.

        Raises:
            UnsupportedModel: it cannot be an INT8 tensor of the NPU; the message says why.
        """
        value = self.values[name]
        if value.problem:
            raise UnsupportedModel(value.problem)
        if any(t is None or t.tensor_type.elem_type != TensorProto.FLOAT for t in value.types):
            raise UnsupportedModel(f"{name!r} is computed by the host and no float32 tensor")
        if (ranges is not None and name not in ranges) or not is_narrow(name, ranges):
            raise UnsupportedModel(f"{name!r} is computed by the host and has no range that INT8 could hold")
        first, second = (self.shape_at(name, batch) or () for batch in PROBE_BATCHES)
        moving = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
        factor, rest = divmod(first[moving[0]], PROBE_BATCHES[0]) if len(moving) == 1 else (0, 0)
        if not factor or rest or factor * PROBE_BATCHES[1] != second[moving[0]] or not 2 <= len(first) <= 6:
            raise UnsupportedModel(f"{name!r}, {list(first)}, is computed by the host and has no batch")
        dims = tuple(factor if i == moving[0] else n for i, n in enumerate(first))
        if min(dims) < 1:
            raise UnsupportedModel(f"{name!r}, {list(first)}, is computed by the host and empty")
        return View(name, dims, moving[0], *((factor, 1) if name in self._innermost else (1, factor)))

    def trace(self, names: Iterable[str], stops: Callable[[str], bool]) -> Trace:
        """What some values derive from, back to raw inputs and to activations where `stops` says yes."""
        nodes: dict[int, NodeProto] = {}
        views: dict[str, View] = {}
        raw: dict[str, None] = {}
        constants: dict[str, None] = {}
        sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        unknown = ""
        open_, seen = list(names), set[str]()
        while open_:
            name = open_.pop()
            if not name or name in seen:
                continue
            seen.add(name)
            if name in self._constants:
                constant = self._constants[name]
                if not constant.depends_on_batch:
                    constants[name] = None
                    continue
                if constant.node is not None and constant.node.op_type == "Shape":
                    sizes[name] = _growth(constant.values)
                    continue
            if name in self._views and stops(name):
                views[name] = self._views[name]
            elif name in self._raw:
                raw[name] = None
            elif name in self._producer:
                index, node = self._producer[name]
                nodes[index] = node
                open_ += node.input
            else:
                unknown = unknown or name
        ordered = tuple(nodes[i] for i in sorted(nodes))
        return Trace(ordered, views, tuple(raw), tuple(constants), sizes, unknown)

    def part(self, name: str, view: View, stops: Callable[[str], bool]) -> g.Operation:
        """The operation that computes a value of the host.

        Args:
            name: of the value.
            view: how it lies on the NPU.
            stops: which activations of the NPU it may begin with.

        Raises:
            UnsupportedModel: nothing in it has a batch, or the parts have grown too large.
        """
        # A value of the host is recomputed from where its own part begins, also where it is on the NPU too.
        trace = self.trace([name], stops)
        if trace.unknown:
            raise UnsupportedModel(f"input {trace.unknown!r} is none that the NPU or its host takes")
        self._nodes_of_parts += len(trace.nodes)
        if self._nodes_of_parts > MAX_PART_NODES:
            raise UnsupportedModel(f"the model's host parts have more than {MAX_PART_NODES} nodes together")
        inputs = [g.HostInput(own, v.name, v.dims, v.axis, v.outer) for own, v in sorted(trace.views.items())]
        batched = {i for i in trace.raw if _dims(self._raw[i][0]) != _dims(self._raw[i][1])}
        inputs += [g.HostInput(own, own, (), None, int(own in batched)) for own in trace.raw]
        if not trace.views and not batched:
            raise UnsupportedModel(f"{name!r} is computed by the host from nothing that has a batch")
        # Large ones are fed as well: they are held once then, however many parts need them.
        fed = tuple(
            n
            for n in trace.constants
            if self._constants[n].parameters or self._constants.array(n).size > _KNOWN_DATA
        )
        operator = g.HostPart(
            self._model_of(name, trace, inputs, set(fed)),
            tuple(inputs),
            fed,
            tuple((own, *growth) for own, growth in trace.sizes.items()),
            sum(multiplications(node, self.shape_of) for node in trace.nodes),
            _operators(trace.nodes),
            next(reason for node in trace.nodes if (reason := self._reasons.get(node.output[0]))),
        )
        nodes = tuple(node.name or node.output[0] for node in trace.nodes)
        return g.Operation(
            name, tuple(x.tensor for x in inputs), operator, view.shape, nodes, outer=view.outer
        )

    def shape_of(self, name: str) -> g.Shape | None:
        """Shape of any value with a batch of one."""
        if name in self._constants:
            return self._constants.array(name).shape
        if name in self._views:
            return self._views[name].at(1)
        if name in self.values:
            return self.shape_at(name, 1)
        return _dims(self._raw[name][0]) if name in self._raw else None

    def _model_of(self, name: str, trace: Trace, inputs: list[g.HostInput], fed: set[str]) -> bytes:
        """A model from the part's inputs, weights and sizes to one output."""
        types = [(x.name, self._type(x.name, 0)) for x in inputs]
        types += [(n, self._type(n, 0)) for n in (*fed, *trace.sizes)]
        values = []
        for own, inferred in types:
            assert inferred is not None
            tensor = inferred.tensor_type
            free = own not in fed and own not in trace.sizes  # the batch may be anywhere
            dims = [None] * len(tensor.shape.dim) if free else [d.dim_value for d in tensor.shape.dim]
            values.append(helper.make_tensor_value_info(own, tensor.elem_type, dims))
        kept = [n for n in trace.constants if n not in fed]
        graph = helper.make_graph(
            trace.nodes,
            "host",
            values,
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(self._constants.array(n), order="C"), n) for n in kept],
        )
        model = helper.make_model(
            graph, opset_imports=self._opset, ir_version=min(self._model.ir_version, 10)
        )
        data: bytes = model.SerializeToString()
        return data

    def _problem_of(self, name: str) -> str:
        return self.values[name].problem if name in self.values and name not in self._constants else ""

    def _type(self, name: str, probe: int) -> TypeProto | None:
        """Type of a value at one of the probe batches."""
        if name in self._constants:
            return _type_of(self._constants[name].values[probe])
        if name in self._views:
            element = TensorProto.BOOL if self._is_bool(name) else TensorProto.FLOAT
            return helper.make_tensor_type_proto(element, self._views[name].at(PROBE_BATCHES[probe]))
        if name in self.values:
            return self.values[name].types[probe]
        return self._raw[name][probe] if name in self._raw else None

    def _inferred(self, node: NodeProto, probe: int) -> Mapping[str, TypeProto]:
        """Types of a node's outputs; those that cannot be told are left out."""
        names = [name for name in node.input if name]
        types = {name: found for name in names if (found := self._type(name, probe)) is not None}
        if len(types) < len(set(names)) or _problem(node):
            return {}
        known = (n for n in names if n in self._constants)
        data = {n: self._constants[n].values[probe] for n in known}
        try:
            schema = onnx.defs.get_schema(node.op_type, self._opset[0].version, "")
            return onnx.shape_inference.infer_node_outputs(
                schema,
                node,
                types,
                {n: numpy_helper.from_array(a, n) for n, a in data.items() if a.size <= _KNOWN_DATA},
                opset_imports=self._opset,
                ir_version=10,
            )
        except Exception:  # it raises whatever its C++ does: the shape stays unknown then
            return {}


def is_narrow(name: str, ranges: Ranges | None) -> bool:
    """False of a value whose range is a mask's."""
    low, high = (-1.0, 1.0) if ranges is None else ranges.get(name, (-1.0, 1.0))
    return -_WIDEST < low < high < _WIDEST


def _growth(values: tuple[Array, Array]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a shape: what it is without samples, and by how much it grows with each."""
    first, second = values
    step = (second - first) // (PROBE_BATCHES[1] - PROBE_BATCHES[0])
    return tuple((first - PROBE_BATCHES[0] * step).tolist()), tuple(step.tolist())


def _type_of(array: Array) -> TypeProto:
    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def _dims(inferred: TypeProto) -> g.Shape | None:
    """Sizes of a tensor; None where one is not known, or where it is no tensor."""
    tensor = inferred.tensor_type
    if not inferred.HasField("tensor_type") or not tensor.HasField("shape"):
        return None
    dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    return dims if min(dims, default=0) >= 0 else None


def _operators(nodes: Iterable[NodeProto]) -> str:
    """What is computed, before what only arranges it."""
    kinds = list(dict.fromkeys(node.op_type for node in nodes))
    names = [kind for kind in kinds if kind not in MOVING | {"Concat"}] or kinds
    return "+".join(names[:_NAMED_OPERATORS]) + "+..." * (len(names) > _NAMED_OPERATORS)


def _called(node: NodeProto) -> str:
    return f"node {node.name or node.output[0]!r} ({node.op_type})"


def _problem(node: NodeProto) -> str:
    """Why the host does not run a node."""
    if node.domain not in ("", "ai.onnx"):
        return f"{_called(node)}: neither the NPU nor its host knows operators of {node.domain!r}"
    if any(a.HasField("g") or a.graphs for a in node.attribute):
        return f"{_called(node)}: the host runs no control flow"
    if node.op_type in RANDOM:
        return f"{_called(node)}: the host computes nothing at random"
    return ""


def _shape_problem(node: NodeProto, types: Types) -> str:
    for inferred in types:
        if inferred is not None and inferred.HasField("sequence_type"):
            continue  # what is taken out of it has a shape, or not
        dims = None if inferred is None else _dims(inferred)
        if dims is None:
            return f"{_called(node)}: the shape of its output is known only when it has run"
        if math.prod(dims) > MAX_ELEMENTS:
            return f"{_called(node)}: its output would have shape {list(dims)}"
    return ""
