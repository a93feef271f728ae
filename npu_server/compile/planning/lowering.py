"""Operations + ranges -> layers: tensors get scale and zero point, layers their line in the layer map."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from npu_server.compile.graph import (
    Add,
    Affine,
    AveragePool,
    Clamp,
    Concat,
    Conv,
    Entry,
    Extreme,
    Function,
    Gemm,
    Graph,
    HostFloat,
    HostPart,
    Interpolate,
    Largest,
    Lut,
    MatMul,
    MaxPool,
    Mean,
    Mul,
    Operation,
    Operator,
    Pad,
    PRelu,
    Rearrange,
    Reshape,
    Select,
    Shape,
    Smallest,
    Sub,
    Sum,
)
from npu_server.compile.planning.registers import never_overflows
from npu_server.compile.planning.work import multiplications
from npu_server.compile.reading.constants import Constants
from npu_server.numerics.functions import FUNCTIONS
from npu_server.numerics.profile import Profile
from npu_server.numerics.requantize import Output
from npu_server.numerics.scales import Quantization, activation_quantization, code_of
from npu_wire.errors import NotCalibrated, UnsupportedModel
from npu_wire.layer_map import INT8_MAX, INT8_MIN, LayerMap, LayerSpec, MemoryLayout, TensorSpec

_MOVES_DATA = MaxPool | Largest | Smallest | Reshape | Rearrange | Select | Pad
_NAMES: dict[type, str] = {
    Clamp: "Relu",
    Interpolate: "Resize",
    Largest: "ReduceMax",
    Smallest: "ReduceMin",
    Sum: "ReduceSum",
}
# TFLite's quantization specification, LOGISTIC and TANH.
_FIXED = {"Sigmoid": Quantization(1 / 256, -128), "Tanh": Quantization(1 / 128, 0)}


@dataclass(frozen=True)
class Layer:
    """One layer, ready but for its weights.

    Attributes:
        spec: its line in the layer map.
        operator: what it does.
        sources: quantization of its inputs, but for raw ones.
        scale: of its output.
        output: zero point and clamp of its output.
        shape: of its output, without the batch.
        clamp: the activation behind it.
    """

    spec: LayerSpec
    operator: Operator
    sources: tuple[Quantization, ...]
    scale: float
    output: Output
    shape: Shape
    clamp: Clamp


@dataclass(frozen=True)
class Plan:
    """The network as layers, with the layer map that the client gets."""

    layer_map: LayerMap
    layers: tuple[Layer, ...]


def lower(
    graph: Graph,
    constants: Constants,
    ranges: Mapping[str, tuple[float, float]],
    profile: Profile,
    image_layout: MemoryLayout,
) -> Plan:
    """Assigns scales and zero points.

    Args:
        graph: what `fuse` returned.
        constants: to tell from which initializers weights derive.
        ranges: value name -> (min, max).
        profile: the arithmetic.
        image_layout: order in which the backend yields rank 4 tensors.

    Raises:
        NotCalibrated: a range is missing.
        InvalidInput: a range that is not finite or of zero width.
        UnsupportedModel: no layer reads an input with a batch dimension.
    """
    used = {name for operation in graph.operations for name in operation.inputs}
    entries = [entry for entry in graph.inputs if entry.name in used]
    if not any(isinstance(entry, Entry) or entry.batched for entry in entries):
        raise UnsupportedModel(
            "no layer reads an input with a batch dimension; the model's input must begin with the batch"
        )
    quantizations = {
        entry.name: _from_range(entry.name, ranges, profile) for entry in entries if isinstance(entry, Entry)
    }
    shapes: dict[str, Shape] = {entry.name: entry.shape for entry in entries}
    layers: list[Layer] = []
    for operation in graph.operations:
        sources = tuple(quantizations[name] for name in operation.inputs if name in quantizations)
        quantization = _output_quantization(operation, sources, ranges, profile)
        layer = _layer(
            operation,
            sources,
            quantization,
            constants,
            image_layout,
            profile.activations.bounds,
            multiplications(operation.operator, shapes[operation.inputs[0]], operation.shape),
            never_overflows(
                operation.operator, sources, shapes[operation.inputs[0]], quantization.scale, profile
            ),
        )
        shapes[operation.output] = operation.shape
        quantizations[operation.output] = quantization
        layers.append(layer)
    inputs = tuple(
        _tensor_spec(entry.name, entry.shape, quantizations[entry.name], MemoryLayout.CONTIGUOUS)
        if isinstance(entry, Entry)
        else entry
        for entry in entries
    )
    outputs = tuple(name for name in graph.outputs if name in quantizations)
    return Plan(LayerMap(inputs, tuple(layer.spec for layer in layers), outputs), tuple(layers))


def between_calibrated(
    graph: Graph, ranges: Mapping[str, tuple[float, float]], profile: Profile
) -> dict[str, NotCalibrated]:
    """Outputs that need a range and have none, while others that derive from them have one: output -> why.

    The network that was calibrated has no such value: the exporter makes several operators of one.
    """
    found = {}
    followed: set[str] = set()
    for operation in reversed(graph.operations):
        name, operator = operation.output, operation.operator
        if name in ranges or name in followed:
            followed.update(operation.inputs)
        if name in ranges or name not in followed or isinstance(operator, Concat):
            continue
        if not _keeps_scale(operator, profile) and _known_bounds(operator) is None:
            found[name] = NotCalibrated(
                f"no range for activation {name!r}, which is a step inside an operator of the network"
            )
    return found


def _from_range(name: str, ranges: Mapping[str, tuple[float, float]], profile: Profile) -> Quantization:
    if name not in ranges:
        raise NotCalibrated(f"no range for activation {name!r}; calibrate the model before it is compiled")
    return activation_quantization(name, *ranges[name], profile)


def _output_quantization(
    operation: Operation,
    sources: tuple[Quantization, ...],
    ranges: Mapping[str, tuple[float, float]],
    profile: Profile,
) -> Quantization:
    operator = operation.operator
    if _keeps_scale(operator, profile):
        return sources[0]
    if isinstance(operator, Lut) and len(operator.steps) == 1:
        function = operator.steps[0].operator
        name = function.name if isinstance(function, Function) else ""
        if profile.lut.output == "fixed" and name in _FIXED:
            return _FIXED[name]
    joins = isinstance(operator, Concat) and not operator.constants and len(set(sources)) == 1
    if joins and operation.output not in ranges:
        return sources[0]  # a roll over two axes joins what nobody but the exporter names
    bounds = _known_bounds(operator)
    if operation.output not in ranges and bounds is not None:
        return activation_quantization(operation.output, *bounds, profile)
    return _from_range(operation.output, ranges, profile)


def _keeps_scale(operator: Operator, profile: Profile) -> bool:
    """Whether an operator's output has its input's scale."""
    if isinstance(operator, AveragePool):
        return profile.average_pool.method in ("input_scale", "reciprocal")
    if isinstance(operator, Mean):
        return profile.mean.method == "input_scale"
    return isinstance(operator, _MOVES_DATA | Interpolate)


def _known_bounds(operator: Operator) -> tuple[float, float] | None:
    """Range of an operator's values by its definition."""
    if isinstance(operator, HostFloat) and operator.op == "Softmax":
        return 0.0, 1.0
    if isinstance(operator, Lut) and len(operator.steps) == 1:
        function = operator.steps[0].operator
        return FUNCTIONS[function.name].bounds if isinstance(function, Function) else None
    return None


def _layer(
    operation: Operation,
    sources: tuple[Quantization, ...],
    quantization: Quantization,
    constants: Constants,
    image_layout: MemoryLayout,
    bounds: str,
    macs: int,
    safe: bool,
) -> Layer:
    operator = operation.operator
    clamp = operator if isinstance(operator, Clamp) else operation.clamp or Clamp()
    bounds = "half_away" if isinstance(operator, Clamp) else bounds
    low, high = _clamped_codes(clamp, quantization, bounds)
    bounded_low, bounded_high = low >= INT8_MIN, high <= INT8_MAX
    if isinstance(operator, Lut):
        # A trained bound learns from what it cuts off, also where the activation has become a table.
        trained = [s.operator for s in operator.steps if isinstance(s.operator, Clamp) and s.operator.names]
        bounded_low |= any(math.isfinite(bound.low) for bound in trained)
        bounded_high |= any(math.isfinite(bound.high) for bound in trained)
    names = {*_constants_of(operator), *clamp.names}
    parameters = sorted({parameter for name in names for parameter in constants[name].parameters})
    layout = image_layout if len(operation.shape) == 3 else MemoryLayout.CONTIGUOUS
    spec = LayerSpec(
        output=_tensor_spec(operation.output, operation.shape, quantization, layout, operation.outer),
        op=_operator_name(operator),
        inputs=operation.inputs,
        fused_nodes=operation.nodes,
        parameters=tuple(parameters),
        # A bound that is the activation's own is no loss: there the float network is flat as well. Nor is
        # the code of real 0 in a tensor that never was negative.
        saturation_low=INT8_MIN - 1 if bounded_low or quantization.zero_point == INT8_MIN else INT8_MIN,
        saturation_high=INT8_MAX + 1 if bounded_high else INT8_MAX,
        moves_data_only=isinstance(operator, _MOVES_DATA)
        or (
            isinstance(operator, Concat)
            and not operator.constants
            and all(source == quantization for source in sources)
        ),
        host_reason=_host_reason(operator),
        macs=macs,
        never_overflows=safe,
    )
    output = _output(clamp, quantization, bounds)
    return Layer(spec, operator, sources, quantization.scale, output, operation.shape, clamp)


def _clamped_codes(clamp: Clamp, q: Quantization, bounds: str) -> tuple[int, int]:
    """Codes of the bounds, beyond INT8 where they bound nothing."""
    low = code_of(clamp.low, q, bounds) if math.isfinite(clamp.low) else INT8_MIN - 1
    high = code_of(clamp.high, q, bounds) if math.isfinite(clamp.high) else INT8_MAX + 1
    return low, high


def _output(clamp: Clamp, q: Quantization, bounds: str) -> Output:
    low, high = _clamped_codes(clamp, q, bounds)
    return Output(q.zero_point, min(max(low, INT8_MIN), INT8_MAX), max(min(high, INT8_MAX), INT8_MIN))


def with_bounds_of_now(layer: Layer, constants: Constants, profile: Profile) -> Layer:
    """The layer with the clamp that its trained bounds make now; the very same where it has none."""
    if not layer.clamp.names:
        return layer
    clamp = layer.clamp.now(constants.number)
    bounds = "half_away" if isinstance(layer.operator, Clamp) else profile.activations.bounds
    quantization = Quantization(layer.scale, layer.output.zero_point)
    return replace(layer, output=_output(clamp, quantization, bounds))


def _operator_name(operator: Operator) -> str:
    if isinstance(operator, Rearrange | Select | HostFloat | HostPart):
        return operator.op
    if isinstance(operator, Conv) and operator.stuffing is not None:
        return "ConvTranspose"
    if isinstance(operator, Extreme):
        return "Max" if operator.largest else "Min"
    return _NAMES.get(type(operator), type(operator).__name__)


def _host_reason(operator: Operator) -> str:
    if isinstance(operator, HostPart):
        return operator.reason
    if isinstance(operator, HostFloat):
        return f"{operator.op} is among the operators that the NPU's profile leaves to the host's float unit"
    return ""


def _constants_of(operator: Operator) -> tuple[str, ...]:
    if isinstance(operator, Conv | Gemm):
        return operator.weights.constants
    if isinstance(operator, Lut):
        names: list[str] = []
        for step in operator.steps:
            names += _constants_of(step.operator)
        return tuple(names)
    if isinstance(operator, Affine):
        return operator.values
    if isinstance(operator, Clamp):
        return operator.names
    if isinstance(operator, Add | Sub | Mul | MatMul):
        return () if operator.operand is None else (operator.operand.name,)
    if isinstance(operator, Concat):
        return tuple(operand.name for _, operand in operator.constants)
    if isinstance(operator, Extreme):
        return tuple(operand.name for operand in operator.constants)
    if isinstance(operator, PRelu):
        return (operator.slope.name,)
    if isinstance(operator, HostFloat):
        return tuple(operand.name for operand in operator.operands)
    if isinstance(operator, HostPart):
        return operator.constants
    return ()


def _tensor_spec(
    name: str, shape: Shape, q: Quantization, layout: MemoryLayout, outer: int = 1
) -> TensorSpec:
    return TensorSpec(name, shape, q.scale, q.zero_point, layout, outer)
