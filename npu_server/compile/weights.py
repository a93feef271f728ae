"""What a layer needs besides its input: quantized weights and multipliers, or a table."""

import math
from dataclasses import dataclass

import numpy as np

from npu_server.compile.constants import Constants
from npu_server.compile.graph import (
    Add,
    Affine,
    Clamp,
    Concat,
    Conv,
    Function,
    Gemm,
    Lut,
    Mul,
    Operation,
    Weights,
)
from npu_server.compile.lowering import Layer
from npu_server.numerics.elementwise import concat_table, function_table, rescale_table
from npu_server.numerics.profile import Profile
from npu_server.numerics.requantize import Multiplier, make_multiplier
from npu_server.numerics.scales import Float64Array, QuantizedWeights, quantize_weights
from npu_wire.errors import InvalidInput, NonFiniteInput
from npu_wire.layer_map import Float32Array, Int8Array


@dataclass(frozen=True)
class Prepared:
    """What `prepare` makes of a layer for one set of weights.

    Attributes:
        weights: of a convolution or fully connected layer.
        multiplier: from its accumulator to its output, one entry an output channel.
        tables: code -> code, one an input (Lut, Clamp, Concat); shape (256,) each.
    """

    weights: QuantizedWeights | None = None
    multiplier: Multiplier | None = None
    tables: tuple[Int8Array, ...] = ()


def prepare(layer: Layer, constants: Constants, profile: Profile) -> Prepared:
    """Folds, quantizes and computes multipliers or tables.

    Raises:
        NonFiniteInput: folded weights hold NaN or infinity.
        InvalidInput: weights so large that no multiplier fits.
    """
    kernel = layer.kernel
    if isinstance(kernel, Conv | Gemm):
        return _prepare_weights(layer, fold(kernel, constants), profile)
    if isinstance(kernel, Clamp):
        return Prepared(
            tables=(
                rescale_table(layer.sources[0], layer.scale, layer.output, profile.requantize_in("clamp")),
            )
        )
    if isinstance(kernel, Concat):
        return Prepared(
            tables=tuple(concat_table(source, layer.scale, layer.output, profile) for source in layer.sources)
        )
    if isinstance(kernel, Lut):
        steps = kernel.steps

        def function(x: Float64Array) -> Float64Array:
            return _evaluate(steps, x, constants)

        return Prepared(
            tables=(function_table(function, layer.sources[0], layer.scale, layer.output, profile),)
        )
    return Prepared()


def fold(kernel: Conv | Gemm, constants: Constants) -> tuple[Float32Array, Float32Array]:
    """Float weight (out, in / groups, height, width) or (out, in) and bias (out,), all folded in."""
    source = kernel.weights
    bias = _bias(source, constants)
    if source.weight is None:
        weight = np.ones((source.channels, 1, 1, 1), np.float32)
    else:
        weight = constants.array(source.weight)
        weight = weight.T if source.transposed and isinstance(kernel, Gemm) else weight
    if source.alpha != 1.0:
        weight = weight * np.float32(source.alpha)
    column = (-1, *[1] * (weight.ndim - 1))
    for affine in source.affines:
        values = [constants.array(name).astype(np.float32).reshape(-1) for name in affine.values]
        scale, shift = _scale_and_shift(affine, values)
        weight = weight * np.broadcast_to(scale, (source.channels,)).reshape(column)
        bias = bias * scale + shift
    return np.ascontiguousarray(weight, np.float32), bias.astype(np.float32)


def _bias(source: Weights, constants: Constants) -> Float32Array:
    bias = np.zeros(source.channels, np.float32)
    if source.bias is not None:
        bias = bias + constants.array(source.bias).astype(np.float32).reshape(-1) * np.float32(source.beta)
    return bias


def _scale_and_shift(affine: Affine, values: list[Float32Array]) -> tuple[Float32Array, Float32Array]:
    one, zero, value = np.ones(1, np.float32), np.zeros(1, np.float32), values[0]
    if affine.kind == "batch_norm":
        gamma, beta, mean, variance = values
        scale = gamma / np.sqrt(variance + np.float32(affine.epsilon))
        return scale, beta - mean * scale
    return {
        "add": (one, value),
        "sub": (one, -value),
        "rsub": (-one, value),
        "mul": (value, zero),
        "div": (one / value, zero) if affine.kind == "div" else (one, zero),
    }[affine.kind]


def _prepare_weights(layer: Layer, folded: tuple[Float32Array, Float32Array], profile: Profile) -> Prepared:
    weight, bias = folded
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise NonFiniteInput(
            f"weights of layer {layer.spec.name!r} hold NaN or infinity; they derive from "
            f"{', '.join(layer.spec.parameters)}"
        )
    source = layer.sources[0].scale
    weights = quantize_weights(weight, bias, source, layer.scale, profile)
    try:
        fully_connected = isinstance(layer.kernel, Gemm)
        rule = profile.requantize_in("fully_connected") if fully_connected else profile.requantize
        multiplier = make_multiplier(weights.scales * source, layer.scale, rule)
    except InvalidInput as error:
        raise InvalidInput(f"layer {layer.spec.name!r}: {error}") from error
    return Prepared(weights=weights, multiplier=multiplier)


def _evaluate(steps: tuple[Operation, ...], x: Float64Array, constants: Constants) -> Float64Array:
    """Value of a chain of element-wise operations; whatever is not among the steps' outputs is x."""
    values: dict[str, Float64Array] = {}
    result = x
    for step in steps:
        operands = [values.get(name, x) for name in step.inputs]
        result = values[step.output] = _evaluate_step(step, operands, constants)
    return result


def _evaluate_step(step: Operation, operands: list[Float64Array], constants: Constants) -> Float64Array:
    kernel, x = step.kernel, operands[0]
    if isinstance(kernel, Add):
        return x + operands[1]
    if isinstance(kernel, Mul):
        return x * operands[1]
    if isinstance(kernel, Clamp):
        return np.clip(x, kernel.low, kernel.high)
    if isinstance(kernel, Affine):
        value = float(constants.array(kernel.values[0]).reshape(-1)[0])
        if not math.isfinite(value) or (kernel.kind == "div" and value == 0):
            raise NonFiniteInput(f"constant {kernel.values[0]!r} is {value}; a table needs a finite number")
        forms = {"add": x + value, "sub": x - value, "rsub": value - x, "mul": x * value}
        return x / value if kernel.kind == "div" else forms[kernel.kind]
    assert isinstance(kernel, Function)
    return _function(kernel, x)


def _function(function: Function, x: Float64Array) -> Float64Array:
    if function.name == "Sigmoid":
        return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))
    if function.name == "Tanh":
        return np.tanh(x)
    if function.name == "HardSigmoid":
        return np.clip(x * function.alpha + function.beta, 0.0, 1.0)
    assert function.name == "HardSwish"
    return x * np.clip(x / 6 + 0.5, 0.0, 1.0)
