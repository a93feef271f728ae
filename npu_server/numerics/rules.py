"""What a numerics profile is made of: every key, its meaning and its legal values.

The docstrings here are the documentation of the keys: `npu-server profiles show NAME` prints them.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

HOST_OPERATORS = frozenset(
    [
        "Div",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "LogSoftmax",
        "RMSNormalization",
        "Softmax",
    ]
)
"""ONNX operators that a profile may give to the host (`HostFloatRule`)."""


def _key(*legal: Any, default: Any = dataclasses.MISSING) -> Any:
    """A key of a profile with its legal values; one with a default may be left out."""
    return dataclasses.field(default=default, metadata={"legal": legal})


@dataclass(frozen=True)
class WeightRule:
    """How weights become INT8; codes in [-127, 127].

    Attributes:
        symmetric: zero point 0 (the only kind there is).
        per_channel: one scale for each output channel instead of one for the tensor.
        scale: "any" or "power_of_two" (rounded up).
    """

    symmetric: bool = _key(True)
    per_channel: bool = _key(True, False)
    scale: str = _key("any", "power_of_two")


@dataclass(frozen=True)
class ActivationRule:
    """How activations become INT8; codes in [-128, 127].

    Attributes:
        kind: "affine" (a zero point of its own) or "symmetric" (zero point 0).
        scale: "any" or "power_of_two" (rounded up).
        bounds: code of the bound of a Clip behind another operator: "half_away" (bound / scale rounded, then
            the zero point), or "half_even" (rounded with the zero point inside: XNNPACK). Of a lone Clip it
            is always "half_away".
    """

    kind: str = _key("affine", "symmetric")
    scale: str = _key("any", "power_of_two")
    bounds: str = _key("half_away", "half_even", default="half_away")


@dataclass(frozen=True)
class AccumulatorRule:
    """The register in which a convolution or a fully connected layer sums up.

    Attributes:
        bits: its width; biases are clipped to it.
        overflow: "saturate" or "wrap".
        where: "sum": overflow acts once, on the finished sum with its bias. "every_mac": the register begins
            with the bias and saturates after each product; products come window row by window row, column by
            column, and for each position input channel by input channel; those of two activations (MatMul)
            begin with 0 and come one by one along the axis that is summed up. (Wrapping is the same in both.)
    """

    bits: int = _key(*range(8, 33))
    overflow: str = _key("saturate", "wrap")
    where: str = _key("sum", "every_mac")


@dataclass(frozen=True)
class RequantizeRule:
    """How an accumulator is brought to the scale of its INT8 output.

    Attributes:
        multiplier: "q31" (31-bit mantissa and shift), "float32", "float64", or "power_of_two" (shift only).
        rounding: of the last step: "half_away", "half_up", "half_even", "floor".
        steps: 2: rounded half up to 31 bits first, then by the shift (gemmlowp); 1: rounded once.
        zero_point: "after_rounding", or "before_rounding" (float32 multipliers of `mul` only; it decides how
            ties fall).
        ratio: "float64", or "float32": the type in which the ratio of scales is computed before it becomes a
            multiplier.
    """

    multiplier: str = _key("q31", "float32", "float64", "power_of_two")
    rounding: str = _key("half_away", "half_up", "half_even", "floor")
    steps: int = _key(1, 2)
    zero_point: str = _key("after_rounding", "before_rounding", default="after_rounding")
    ratio: str = _key("float64", "float32", default="float64")


@dataclass(frozen=True)
class Exceptions:
    """Operators that requantize by a rule of their own, each with all keys of [requantize].

    Attributes:
        grouped: convolutions in groups of more than one channel.
        fully_connected: Gemm, and MatMul by a constant.
        matmul: MatMul of two activations.
        add: the rescalings of the methods "shifted_int32" and "int8".
        add_operands: those of the operands of "shifted_int32" additions, where they round otherwise than that
            of the sum.
        sub_operands: the same of differences.
        mul: product of two activations.
        concat: the operands of a concatenation, by its method "requantize".
        clamp: a lone Relu or Clip.
        leaky_relu: by lut.leaky_relu "requantize", and where "multiplier_8bit" falls back on it.
        mean: average over axes, by its method "requantize".
        average_pool: by its method "requantize".
    """

    grouped: RequantizeRule | None = None
    fully_connected: RequantizeRule | None = None
    matmul: RequantizeRule | None = None
    add: RequantizeRule | None = None
    add_operands: RequantizeRule | None = None
    sub_operands: RequantizeRule | None = None
    mul: RequantizeRule | None = None
    concat: RequantizeRule | None = None
    clamp: RequantizeRule | None = None
    leaky_relu: RequantizeRule | None = None
    mean: RequantizeRule | None = None
    average_pool: RequantizeRule | None = None


@dataclass(frozen=True)
class AddRule:
    """Addition of two INT8 tensors.

    Attributes:
        method: "shifted_int32" (operands shifted left and rescaled to a common scale), "multiplier_21bit"
            (each operand times a 21-bit multiplier, one sum, one shift that rounds half up: XNNPACK),
            "float32_fma" (two fused multiply-adds in float32 with the zero point inside, that of the second
            operand first; an operand that is spread along the last axis is the second: ONNX Runtime), or
            "int8" (each operand requantized to the output's scale and clamped to INT8 before a saturating
            INT8 addition).
        left_shift: bits of head room of "shifted_int32".
    """

    method: str = _key("shifted_int32", "multiplier_21bit", "float32_fma", "int8")
    left_shift: int = _key(*range(21), default=0)


@dataclass(frozen=True)
class ConcatRule:
    """How operands of a concatenation come to the output's scale.

    Attributes:
        method: "requantize" (by `RequantizeRule`), "multiplier_8bit" (a multiplier of 8 fractional bits,
            rounded half up: XNNPACK), or "table" (dequantize and quantize in float32, half to even).
    """

    method: str = _key("requantize", "multiplier_8bit", "table")


@dataclass(frozen=True)
class AverageRule:
    """An average over a window.

    Attributes:
        method: "input_scale" (the output keeps the input's scale; sum of codes / count, rounded),
            "reciprocal" (for average pools; the output keeps the input's scale; the centred sum times a
            30-bit reciprocal of the count, rounded half up: TOSA), "requantize" (the sum times input scale /
            (output scale * count) by `RequantizeRule`), "float32_codes" (for means; the sum of the codes
            themselves times a float32 factor, plus a float32 offset that holds both zero points, half to
            even: XNNPACK), or, for average pools, "float32_sum" (dequantized, summed row by row in float32,
            divided, quantized half to even with the zero point inside; a window without padding that covers
            the whole image is an exact sum times one float32 factor, half to even, then the zero point: ONNX
            Runtime).
        rounding: of "input_scale": "half_away", "half_even" or "floor".
    """

    method: str = _key("input_scale", "reciprocal", "requantize", "float32_codes", "float32_sum")
    rounding: str = _key("half_away", "half_even", "floor", default="")


@dataclass(frozen=True)
class SumRule:
    """A sum over axes.

    Attributes:
        method: "requantize" (the sum of the centred codes, by [requantize]), "float32_codes" (as for means:
            XNNPACK), or "float32_half_away" (the sum of the codes themselves times a float32 factor, plus a
            float32 offset that holds the input's zero point, half away, then the output's: LiteRT's ruy).
    """

    method: str = _key("requantize", "float32_codes", "float32_half_away", default="requantize")


@dataclass(frozen=True)
class LutRule:
    """A 256-entry table of a function.

    Attributes:
        rounding: "half_away" or "half_even".
        arithmetic: "float64" or "float32", in which its entries are computed: float32 as C computes them.
        zero_point: "after_rounding", or "before_rounding" (it decides how ties fall).
        output: scale of a lone logistic or tanh: "calibrated", or "fixed" (1/256 with zero point -128 and
            1/128 with zero point 0, as TFLite has it).
        sigmoid: "table", "float64" (a table in float32 whose function alone is computed in float64: XNNPACK),
            or "int32": a Sigmoid node's entries come from 32-bit fixed point (TFLM); needs a fixed output.
        tanh: "table", or "int32": as for sigmoid.
        hard_swish: "table", or "int16": a HardSwish node's entries come from 16-bit fixed point (TFLite).
        leaky_relu: "table"; or a LeakyRelu node's codes are multiplied, by a factor for each side of zero:
            "requantize" (by `RequantizeRule`: TFLite), "multiplier_8bit" (factors of 8 fractional bits,
            rounded half up, where both lie in [2^-8, 2^7], "requantize" elsewhere: XNNPACK), or
            "float32_divided" (dequantized and divided in float32, half to even: ONNX Runtime).
    """

    rounding: str = _key("half_away", "half_even")
    arithmetic: str = _key("float64", "float32", default="float64")
    zero_point: str = _key("after_rounding", "before_rounding", default="after_rounding")
    output: str = _key("calibrated", "fixed", default="calibrated")
    sigmoid: str = _key("table", "float64", "int32", default="table")
    tanh: str = _key("table", "int32", default="table")
    hard_swish: str = _key("table", "int16", default="table")
    leaky_relu: str = _key("table", "requantize", "multiplier_8bit", "float32_divided", default="table")


@dataclass(frozen=True)
class HostFloatRule:
    """What the NPU's host computes in floating point between two layers of the NPU.

    Such a layer dequantizes its inputs to float64, computes, and quantizes its output half to even; the layer
    map marks it. An operator that neither is listed here nor has an integer definition is refused.

    Attributes:
        operators: list of ONNX operators: "Div" (of two activations), "GroupNormalization",
            "InstanceNormalization", "LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax".
    """

    operators: tuple[str, ...] = _key(*sorted(HOST_OPERATORS), default=())
