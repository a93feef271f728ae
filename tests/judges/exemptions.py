"""What a profile does not claim: operators, and conditions under which its engine computes otherwise."""

from collections.abc import Callable

import numpy as np

from npu_server.compile import graph as g
from npu_server.numerics.profile import Profile
from npu_server.numerics.scales import Quantization
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Int8Array

from .layers import JudgedLayer, constants_as_activations

_BY_KERNEL: dict[type, str] = {
    g.Add: "add",
    g.AveragePool: "average pool",
    g.Clamp: "relu",
    g.Concat: "concat",
    g.Extreme: "max and min",
    g.Gemm: "fully connected",
    g.HostFloat: "host float",
    g.Interpolate: "resize bilinear",
    g.MatMul: "product of activations",
    g.MaxPool: "max pool",
    g.Mean: "mean",
    g.Mul: "mul",
    g.PRelu: "prelu",
    g.Pad: "pad",
    g.Sub: "sub",
    g.Sum: "reduce sum",
}
_BY_FUNCTION = {"HardSwish": "hard swish", "LeakyRelu": "leaky relu", "Sigmoid": "sigmoid", "Tanh": "tanh"}


def operator_of(judged: JudgedLayer) -> str:
    """The row of the matrix that a layer belongs to; empty where it moves codes only."""
    operator = judged.layer.operator
    if isinstance(operator, g.Conv):
        return _convolution(judged, operator)
    if isinstance(operator, g.Lut):
        alone = operator.steps[0].operator if len(operator.steps) == 1 else None
        return _BY_FUNCTION.get(getattr(alone, "name", ""), "other functions")
    with_constants = isinstance(operator, g.Add | g.Sub | g.Mul) and operator.operand is not None
    if with_constants or (isinstance(operator, g.Concat) and operator.constants):
        return "constant operands"
    if isinstance(operator, g.Select) and operator.op == "Resize":
        return "resize nearest"
    return _BY_KERNEL.get(type(operator), "")


def _convolution(judged: JudgedLayer, operator: g.Conv) -> str:
    assert judged.prepared.weights is not None
    if operator.stuffing is not None:
        return "transposed convolution"
    if operator.groups > 1:
        per_group = judged.prepared.weights.codes.shape[1]
        return "depthwise convolution" if per_group == 1 else "grouped convolution"
    if operator.window.dilations != (1, 1):
        return "dilated convolution"
    return "pointwise convolution" if operator.window.size == (1, 1) else "convolution"


Condition = Callable[[JudgedLayer, list[Int8Array]], bool]


def _no_multiple_of_16(operator: type) -> Condition:
    """Loops that take 16 elements at a time leave the rest to code that rounds otherwise."""
    return lambda judged, inputs: (
        isinstance(judged.layer.operator, operator) and any(x.size % 16 for x in inputs)
    )


def _reach(source: Quantization) -> int:
    """Largest code without its zero point."""
    return max(INT8_MAX - source.zero_point, source.zero_point - INT8_MIN)


def _products_beyond_16_bits(judged: JudgedLayer, inputs: list[Int8Array]) -> bool:
    """They wrap where they should saturate."""
    reach = np.prod([_reach(source) * source.scale for source in judged.layer.sources]) / judged.layer.scale
    return isinstance(judged.layer.operator, g.Mul) and bool(reach > 2**15 - 256)


def _sums_beyond_16_bits(judged: JudgedLayer, inputs: list[Int8Array]) -> bool:
    reach = sum(_reach(source) * source.scale for source in judged.layer.sources) / judged.layer.scale
    return isinstance(judged.layer.operator, g.Add) and reach > 2**15 - 256


def _ratios_outside(operator: type, low: float, high: float) -> Condition:
    """Operands whose scale is no multiple of the output's in [low, high): another kernel takes them."""

    def applies(judged: JudgedLayer, inputs: list[Int8Array]) -> bool:
        layer = judged.layer
        ratios = [source.scale / layer.scale for source in layer.sources]
        if isinstance(layer.operator, g.Mul):
            ratios = [layer.sources[0].scale * layer.sources[-1].scale / layer.scale]
        return isinstance(layer.operator, operator) and not all(low <= ratio < high for ratio in ratios)

    return applies


def _overhang_beside_counted_pads(judged: JudgedLayer, inputs: list[Int8Array]) -> bool:
    """What ceil_mode adds is counted as padding there; ONNX and torch do not count it."""
    operator = judged.layer.operator
    return isinstance(operator, g.AveragePool) and operator.count_pads and operator.window.overhang != (0, 0)


def _hard_swish_of_small_scales(judged: JudgedLayer, inputs: list[Int8Array]) -> bool:
    """Its last shift is wider than the 16 bits that it shifts."""
    return operator_of(judged) == "hard swish" and judged.layer.sources[0].scale / judged.layer.scale < 2**-9


CONDITIONS: dict[str, Condition] = {
    "add: element counts that are no multiple of 16": _no_multiple_of_16(g.Add),
    "add: sums beyond 2^15 output steps": _sums_beyond_16_bits,
    "add: operands' scales outside of [2^-10, 2^8) output scales": _ratios_outside(g.Add, 2**-10, 2**8),
    "average pool: ceil_mode with padding that counts": _overhang_beside_counted_pads,
    "concat: operands whose element count is no multiple of 16": _no_multiple_of_16(g.Concat),
    "concat: operands' scales outside of [2^-8, 2^7) output scales": _ratios_outside(g.Concat, 2**-8, 2**7),
    "hard swish: input scales below 2^-9 output scales": _hard_swish_of_small_scales,
    "max and min: operands whose element count is no multiple of 16": _no_multiple_of_16(g.Extreme),
    "max and min: operands' scales outside of [2^-8, 2^7) output scales": _ratios_outside(
        g.Extreme, 2**-8, 2**7
    ),
    "mul: products beyond 2^15 output steps": _products_beyond_16_bits,
    "mul: products of scales outside of [2^-16, 2^8) output scales": _ratios_outside(g.Mul, 2**-16, 2**8),
    "sub: operands' scales outside of [2^-10, 2^8) output scales": _ratios_outside(g.Sub, 2**-10, 2**8),
}
"""An entry of a profile's `unjudged` -> whether it covers a layer on some input."""


def exemption(judged: JudgedLayer, inputs: list[Int8Array], profile: Profile) -> str:
    """The condition among a profile's `unjudged` entries that covers this layer; empty if none does."""
    judged, inputs = constants_as_activations(judged, inputs)
    for entry in profile.unjudged:
        if entry in CONDITIONS and CONDITIONS[entry](judged, inputs):
            return entry
    return ""
