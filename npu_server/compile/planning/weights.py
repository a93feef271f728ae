"""What a layer needs besides its input: quantized weights and multipliers, or a table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from npu_server.compile.graph import (
    Add,
    Affine,
    Choose,
    Clamp,
    Concat,
    Conv,
    Extreme,
    Function,
    Gemm,
    HostFloat,
    HostPart,
    Lut,
    MatMul,
    Mul,
    Operand,
    Operation,
    PRelu,
    Sub,
    Weights,
)
from npu_server.compile.planning.lowering import Layer
from npu_server.compile.reading.constants import Array, Constants
from npu_server.numerics import float_ops, functions
from npu_server.numerics.elementwise import concat_table, function_table, rescale_table
from npu_server.numerics.named_functions import named_table
from npu_server.numerics.profile import Profile
from npu_server.numerics.requantize import Multiplier, Output, make_multiplier
from npu_server.numerics.rules import RequantizeRule
from npu_server.numerics.scales import (
    Float64Array,
    Quantization,
    QuantizedWeights,
    activation_quantization,
    quantize_weights,
)
from npu_wire.errors import InvalidInput, NonFiniteInput
from npu_wire.layer_map import Float32Array, Int8Array

Number = TypeVar("Number", bound=npt.NDArray[Any])


@dataclass(frozen=True)
class QuantizedOperand:
    """A constant beside an activation: its scale follows its own values, as a weight's does.

    Attributes:
        codes: int8, in the shape in which it broadcasts with the activation.
        quantization: of the codes.
    """

    codes: Int8Array
    quantization: Quantization


@dataclass(frozen=True)
class Prepared:
    """What `prepare` makes of a layer for one set of weights.

    Attributes:
        weights: of a convolution or fully connected layer.
        multiplier: from its accumulator to its output, one entry an output channel (MatMul: one).
        tables: code -> code, one an input (Lut, Clamp, Concat, Extreme), shape (256,) each; PRelu: one, shape
            (slopes, 256).
        operand: the constant of Add, Sub, Mul, MatMul.
        joined: codes of the constants of Concat and Extreme, in the output's scale.
        reals: constants of HostFloat in the order of its `operands`.
        feeds: constants of HostPart by name, as they are.
    """

    weights: QuantizedWeights | None = None
    multiplier: Multiplier | None = None
    tables: tuple[Int8Array, ...] = ()
    operand: QuantizedOperand | None = None
    joined: tuple[Int8Array, ...] = ()
    reals: tuple[Float64Array, ...] = ()
    feeds: Mapping[str, Array] = field(default_factory=dict)


def prepare(layer: Layer, constants: Constants, profile: Profile) -> Prepared:
    """Folds, quantizes and computes multipliers or tables.

    Raises:
        NonFiniteInput: folded weights hold NaN or infinity.
        InvalidInput: weights so large that no multiplier fits.
    """
    operator = layer.operator
    if isinstance(operator, Conv | Gemm):
        return _prepare_weights(layer, fold(operator, constants), profile)
    if isinstance(operator, Clamp):
        return Prepared(
            tables=(
                rescale_table(layer.sources[0], layer.scale, layer.output, profile.requantize_in("clamp")),
            )
        )
    if isinstance(operator, Concat | Extreme):
        operands = operator.constants if isinstance(operator, Extreme) else [o for _, o in operator.constants]
        joined = [_values(layer, operand, constants) for operand in operands]
        return Prepared(
            tables=tuple(
                concat_table(source, layer.scale, layer.output, profile) for source in layer.sources
            ),
            joined=tuple(float_ops.quantize(value, layer.scale, layer.output) for value in joined),
        )
    if isinstance(operator, Lut):
        return Prepared(tables=(_lut(layer, operator, constants, profile),))
    if isinstance(operator, PRelu):
        return Prepared(tables=(_prelu_tables(layer, operator, constants, profile),))
    if isinstance(operator, MatMul):
        operand = None
        if operator.operand is not None:
            operand = _quantize_operand(layer, _values(layer, operator.operand, constants), profile)
        other = layer.sources[1] if operand is None else operand.quantization
        scales = np.array(layer.sources[0].scale * other.scale)
        for factor in operator.factors:
            scales = scales * scale_and_shift(factor.kind, _number(factor, constants))[0]
        return Prepared(
            multiplier=_multiplier(layer, scales, profile.requantize_in("matmul")), operand=operand
        )
    if isinstance(operator, Add | Sub | Mul) and operator.operand is not None:
        values = _values(layer, operator.operand, constants)
        divides = isinstance(operator, Mul) and operator.divides
        return Prepared(operand=_quantize_operand(layer, 1 / values if divides else values, profile))
    if isinstance(operator, HostPart):
        return Prepared(feeds={name: constants.array(name) for name in operator.constants})
    if isinstance(operator, HostFloat):
        hidden = set(operator.masks)
        return Prepared(
            reals=tuple(_values(layer, o, constants, infinite=o in hidden) for o in operator.operands)
        )
    return Prepared()


def _table(function: Callable[[Float64Array], Float64Array], layer: Layer, profile: Profile) -> Int8Array:
    return function_table(function, layer.sources[0], layer.scale, layer.output, profile)


def _lut(layer: Layer, operator: Lut, constants: Constants, profile: Profile) -> Int8Array:
    """A function that the profile's NPU has a way of its own for, or any chain of operations."""
    steps, alone = operator.steps, operator.steps[0].operator
    if len(steps) == 1 and isinstance(alone, Function):
        source, scale, out = layer.sources[0], layer.scale, layer.output
        try:
            table = named_table(alone.name, alone.alpha, source, scale, out, profile)
        except InvalidInput as error:
            raise InvalidInput(f"layer {layer.spec.name!r}: {error}") from error
        if table is not None:
            return table
    return _table(lambda x: _evaluate(steps, x, constants), layer, profile)


def _prelu_tables(layer: Layer, operator: PRelu, constants: Constants, profile: Profile) -> Int8Array:
    """One table a slope."""
    slopes = _values(layer, operator.slope, constants).reshape(-1).tolist()

    def leaky(slope: float) -> Callable[[Float64Array], Float64Array]:
        return lambda x: functions.evaluate("LeakyRelu", x, slope, 0.0)

    return np.stack([_table(leaky(slope), layer, profile) for slope in slopes])


def _number(affine: Affine, constants: Constants) -> Float64Array:
    return np.array(constants.number(affine.values[0]))


def _values(layer: Layer, operand: Operand, constants: Constants, infinite: bool = False) -> Float64Array:
    """A constant as float64, in the shape in which it broadcasts; one that masks may be minus infinity."""
    values = constants.sample(operand.name, operand.batch_axis).astype(np.float64).reshape(operand.shape)
    if not (np.isfinite(values) | (infinite & np.isneginf(values))).all():
        raise NonFiniteInput(f"layer {layer.spec.name!r}: constant {operand.name!r} holds NaN or infinity")
    return values


def _quantize_operand(layer: Layer, values: Float64Array, profile: Profile) -> QuantizedOperand:
    """Quantized as an activation whose range is that of the values."""
    if not np.isfinite(values).all():
        raise NonFiniteInput(f"layer {layer.spec.name!r} divides by a constant that holds 0")
    largest = float(np.abs(values).max())
    # Nothing but zeros has no scale of its own.
    low, high = (float(values.min()), float(values.max())) if largest > 1e-30 else (-1.0, 1.0)
    low, high = min(low, 0.0), max(high, 0.0)
    quantization = activation_quantization(f"constant of {layer.spec.name}", low, high, profile)
    codes = float_ops.quantize(values, quantization.scale, Output(quantization.zero_point))
    return QuantizedOperand(codes, quantization)


def _multiplier(layer: Layer, scales: Float64Array, rule: RequantizeRule) -> Multiplier:
    try:
        return make_multiplier(scales, layer.scale, rule)
    except InvalidInput as error:
        raise InvalidInput(f"layer {layer.spec.name!r}: {error}") from error


@np.errstate(all="ignore")  # what becomes infinite or NaN is refused by the layer's name
def fold(operator: Conv | Gemm, constants: Constants) -> tuple[Float32Array, Float32Array]:
    """Float weight (out, in / groups, height, width) or (out, in) and bias (out,), all folded in."""
    source = operator.weights
    bias = _bias(source, constants)
    if source.weight is None:
        ones = np.ones((source.channels, 1, 1, 1), np.float32)
        weight = ones if isinstance(operator, Conv) else np.eye(source.channels, dtype=np.float32)
    else:
        weight = constants.array(source.weight)
        weight = _as_convolution(operator, weight) if isinstance(operator, Conv) else weight
        weight = weight.T if source.transposed else weight
    if source.alpha != 1.0:
        weight = weight * np.float32(source.alpha)
    column = (-1, *[1] * (weight.ndim - 1))
    for affine in source.affines:
        # A constant may repeat one sample over the batch: a recurrent cell's state before the first step.
        axis = None if affine.operand is None else affine.operand.batch_axis
        values = [constants.sample(name, axis).astype(np.float32).reshape(-1) for name in affine.values]
        scale, shift = _scale_and_shift(affine, values)
        weight = weight * np.broadcast_to(scale, (source.channels,)).reshape(column)
        bias = bias * scale + shift
    return np.ascontiguousarray(weight, np.float32), bias.astype(np.float32)


def _as_convolution(operator: Conv, weight: Float32Array) -> Float32Array:
    """(out, in / groups, height, width), of a sequence's weight and of a transposed convolution's as well."""
    weight = weight.reshape(*weight.shape[:2], *operator.window.size)
    if operator.stuffing is None:
        return weight
    inputs, outputs, *size = weight.shape
    grouped = weight.reshape(operator.groups, inputs // operator.groups, outputs, *size).swapaxes(1, 2)
    return grouped.reshape(operator.groups * outputs, inputs // operator.groups, *size)[..., ::-1, ::-1]


def _bias(source: Weights, constants: Constants) -> Float32Array:
    bias = np.zeros(source.channels, np.float32)
    if source.bias is not None:
        bias = bias + constants.array(source.bias).astype(np.float32).reshape(-1) * np.float32(source.beta)
    return bias


def _scale_and_shift(affine: Affine, values: list[Float32Array]) -> tuple[Float32Array, Float32Array]:
    if affine.kind == "batch_norm":
        gamma, beta, mean, variance = values
        scale = gamma / np.sqrt(variance + np.float32(affine.epsilon))
        return scale, beta - mean * scale
    return scale_and_shift(affine.kind, values[0])


def scale_and_shift(kind: str, value: Number) -> tuple[Number, Number]:
    """Factor and summand of an `Affine` other than batch norm, in the type and shape of its constant."""
    one, zero = np.ones_like(value), np.zeros_like(value)
    return {
        "add": (one, value),
        "sub": (one, -value),
        "rsub": (-one, value),
        "mul": (value, zero),
        "div": (one / value, zero) if kind == "div" else (one, zero),
    }[kind]


def _prepare_weights(layer: Layer, folded: tuple[Float32Array, Float32Array], profile: Profile) -> Prepared:
    weight, bias = folded
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise NonFiniteInput(
            f"weights of layer {layer.spec.name!r} hold NaN or infinity; they derive from "
            f"{', '.join(layer.spec.parameters)}"
        )
    source = layer.sources[0].scale
    weights = quantize_weights(weight, bias, source, layer.scale, profile)
    multiplier = _multiplier(layer, weights.scales * source, _requantize_rule(layer, weight.shape, profile))
    return Prepared(weights=weights, multiplier=multiplier)


def _requantize_rule(layer: Layer, weight_shape: tuple[int, ...], profile: Profile) -> RequantizeRule:
    if isinstance(layer.operator, Gemm):
        return profile.requantize_in("fully_connected")
    grouped = isinstance(layer.operator, Conv) and layer.operator.groups > 1 and weight_shape[1] > 1
    return profile.requantize_in("grouped") if grouped else profile.requantize


def _evaluate(steps: tuple[Operation, ...], x: Float64Array, constants: Constants) -> Float64Array:
    """Value of a chain of element-wise operations; whatever is not among the steps' outputs is x."""
    values: dict[str, Float64Array] = {}
    result = x
    for step in steps:
        operands = [values.get(name, x) for name in step.inputs]
        result = values[step.output] = _evaluate_step(step, operands, constants)
    return result


def _evaluate_step(step: Operation, operands: list[Float64Array], constants: Constants) -> Float64Array:
    operator, x = step.operator, operands[0]
    if isinstance(operator, Add):
        return x + operands[1]
    if isinstance(operator, Sub):
        return x - operands[1]
    if isinstance(operator, Mul):
        return x * operands[1]
    if isinstance(operator, Choose):
        return np.where(x, operands[1], operands[2])
    if isinstance(operator, Clamp):
        clamp = operator.now(constants.number)
        return np.clip(x, clamp.low, clamp.high)
    if isinstance(operator, Affine):
        value = constants.number(operator.values[0])
        if operator.kind == "div" and value == 0:
            raise NonFiniteInput(f"constant {operator.values[0]!r} is {value}; a table needs a finite number")
        forms = {"add": x + value, "sub": x - value, "rsub": value - x, "mul": x * value}
        return x / value if operator.kind == "div" else forms[operator.kind]
    assert isinstance(operator, Function)
    return functions.evaluate(operator.name, x, operator.alpha, operator.beta)
