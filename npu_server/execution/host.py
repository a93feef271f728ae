"""Layers that the host computes in floating point, the same for every backend."""

import numpy as np

from npu_server.compile.graph import HostFloat
from npu_server.compile.planning.lowering import Layer
from npu_server.compile.planning.weights import Prepared, scale_and_shift
from npu_server.numerics import float_ops
from npu_server.numerics.scales import Float64Array
from npu_wire.layer_map import Int8Array


def compute_on_host(
    layer: Layer, operator: HostFloat, prepared: Prepared, inputs: list[Int8Array]
) -> Int8Array:
    """Dequantizes, computes in float64, quantizes (`HostFloatRule`).

    Args:
        layer: the layer.
        operator: what it computes.
        prepared: its constants.
        inputs: codes, shape (n, ...) in logical order.

    Returns:
        Codes, shape (n, *layer.shape).
    """
    real = [float_ops.dequantize(codes, source) for codes, source in zip(inputs, layer.sources, strict=True)]
    with np.errstate(all="ignore"):
        result = _compute(operator, prepared, real).reshape(len(inputs[0]), *layer.shape)
        own = len(operator.operands) - len(operator.affines)
        for affine, value in zip(operator.affines, prepared.reals[own:], strict=True):
            scale, shift = scale_and_shift(affine.kind, value)
            result = result * scale + shift
    return float_ops.quantize(result, layer.scale, layer.output)


def _compute(operator: HostFloat, prepared: Prepared, real: list[Float64Array]) -> Float64Array:
    if operator.op == "Div":
        quotient: Float64Array = real[0] / real[1]
        return quotient
    values = iter(prepared.reals)
    x = real[0].reshape(len(real[0]), *(operator.masked or operator.split))
    for _ in operator.masks:
        x = x + next(values)
    x = x.reshape(len(x), *operator.split)
    if operator.op == "Softmax":
        return float_ops.softmax(x, operator.axes[0])
    if operator.op == "LogSoftmax":
        return float_ops.log_softmax(x, operator.axes[0])
    rule = float_ops.root_mean_square if operator.op == "RMSNormalization" else float_ops.normalize
    result = rule(x, operator.axes, operator.epsilon)
    if operator.scale is not None:
        result = result * next(values)
    return result if operator.shift is None else result + next(values)
