"""Additions, products, concatenation operands, tables and averages of INT8 tensors, in NumPy."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from npu_server.numerics.profile import Profile
from npu_server.numerics.requantize import (
    Output,
    make_multiplier,
    requantize,
    scale_and_round,
    to_int8,
)
from npu_server.numerics.rules import AverageRule, RequantizeRule
from npu_server.numerics.scales import Float64Array, Int64Array, Quantization, round_half_away
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Float32Array, Int8Array

CODES: Int8Array = np.arange(INT8_MIN, INT8_MAX + 1).astype(np.int8)
"""Every INT8 code, ascending; entry of code q in a table: q + 128."""


def add(
    a: Int8Array,
    qa: Quantization,
    b: Int8Array,
    qb: Quantization,
    scale: float,
    out: Output,
    profile: Profile,
    sign: int = 1,
) -> Int8Array:
    """Sum (sign 1) or difference (-1) of two INT8 tensors, in the output's scale (`AddRule`)."""
    x, y = a.astype(np.int64) - qa.zero_point, b.astype(np.int64) - qb.zero_point
    rule = profile.requantize_in("add")
    if profile.add.method == "multiplier_21bit":
        return _add_multiplier_21bit(x, qa.scale, sign * y, qb.scale, scale, out)
    if profile.add.method == "int8":
        x = to_int8(scale_and_round(x, make_multiplier(np.array(qa.scale), scale, rule)), Output(0)).astype(
            np.int64
        )
        y = to_int8(scale_and_round(y, make_multiplier(np.array(qb.scale), scale, rule)), Output(0)).astype(
            np.int64
        )
        return to_int8(x + sign * y, out)
    if profile.add.method == "shifted_int32":
        common = 2 * max(qa.scale, qb.scale)
        bits = profile.add.left_shift
        own = profile.exceptions.add_operands if sign > 0 else profile.exceptions.sub_operands
        operands = own or rule
        x = scale_and_round(x << bits, make_multiplier(np.array(qa.scale), common, operands))
        y = scale_and_round(y << bits, make_multiplier(np.array(qb.scale), common, operands))
        return requantize(x + sign * y, make_multiplier(np.array(common), 2.0**bits * scale, rule), out)
    return _add_float32(a, qa, b, qb, scale, out, sign)


def _add_multiplier_21bit(
    x: Int64Array, scale_x: float, y: Int64Array, scale_y: float, scale: float, out: Output
) -> Int8Array:
    """XNNPACK's qs8-vadd-minmax: the larger ratio takes 21 bits, one shift rounds half up."""
    ratio_x, ratio_y = np.float32(scale_x) / np.float32(scale), np.float32(scale_y) / np.float32(scale)
    shift = 21 - int(np.frexp(max(ratio_x, ratio_y))[1])
    factor_x, factor_y = (int(np.rint(np.ldexp(np.float64(ratio), shift))) for ratio in (ratio_x, ratio_y))
    return to_int8((x * factor_x + y * factor_y + (1 << (shift - 1))) >> shift, out)


def _add_float32(
    a: Int8Array, qa: Quantization, b: Int8Array, qb: Quantization, scale: float, out: Output, sign: int
) -> Int8Array:
    """ONNX Runtime's MlasQLinearAdd: zero points in one constant, fused multiply-adds, b's before a's."""
    ratio_a = np.float32(qa.scale) / np.float32(scale)
    ratio_b = np.float32(sign * qb.scale) / np.float32(scale)
    zero_b = np.asarray(ratio_b * np.float32(qb.zero_point))
    offset = np.float32(out.zero_point) - _fused_multiply_add(np.asarray(qa.zero_point), ratio_a, zero_b)
    first = _fused_multiply_add(b, ratio_b, np.asarray(offset))
    second = _fused_multiply_add(a, ratio_a, first)
    return np.clip(np.rint(second), out.low, out.high).astype(np.int8)


def _fused_multiply_add(
    codes: npt.NDArray[Any], factor: np.float32, addend: npt.NDArray[Any]
) -> Float32Array:
    """Codes * factor + addend with one float32 rounding: float64 holds product and sum without loss."""
    return (codes.astype(np.float64) * np.float64(factor) + addend.astype(np.float64)).astype(np.float32)


def mul(
    a: Int8Array,
    qa: Quantization,
    b: Int8Array,
    qb: Quantization,
    scale: float,
    out: Output,
    profile: Profile,
) -> Int8Array:
    """Product of two INT8 tensors that broadcast, in the output's scale."""
    product = (a.astype(np.int64) - qa.zero_point) * (b.astype(np.int64) - qb.zero_point)
    rule = profile.requantize_in("mul")
    if rule.multiplier == "float32":
        factor = np.float32(qa.scale) * np.float32(qb.scale) / np.float32(scale)
        real = product.astype(np.float32) * factor
        if rule.zero_point == "before_rounding":
            return to_int8(np.rint(real + np.float32(out.zero_point)).astype(np.int64) - out.zero_point, out)
        return to_int8(np.rint(real).astype(np.int64), out)
    return requantize(product, make_multiplier(np.array(qa.scale * qb.scale), scale, rule), out)


def rescale_table(source: Quantization, scale: float, out: Output, rule: RequantizeRule) -> Int8Array:
    """For each code of one scale the code in another, by a requantize rule; shape (256,)."""
    if source == Quantization(scale, out.zero_point):
        return np.clip(CODES, out.low, out.high).astype(np.int8)
    multiplier = make_multiplier(np.array(source.scale), scale, rule)
    return requantize(CODES.astype(np.int64) - source.zero_point, multiplier, out)


def concat_table(source: Quantization, scale: float, out: Output, profile: Profile) -> Int8Array:
    """For each code of an operand the code in the output's scale (`ConcatRule`); shape (256,)."""
    if profile.concat.method == "requantize":
        return rescale_table(source, scale, out, profile.requantize_in("concat"))
    if profile.concat.method == "multiplier_8bit":
        # XNNPACK's qs8-vcvt.
        factor = int(np.rint(256 * np.float64(np.float32(source.scale) / np.float32(scale))))
        return to_int8(((CODES.astype(np.int64) - source.zero_point) * factor + 128) >> 8, out)
    real = (CODES.astype(np.float32) - np.float32(source.zero_point)) * np.float32(source.scale)
    return to_int8(np.rint(real / np.float32(scale)).astype(np.int64), out)


def function_table(
    function: Callable[[Float64Array], Float64Array],
    source: Quantization,
    scale: float,
    out: Output,
    profile: Profile,
) -> Int8Array:
    """For each code the code of a function's value (`LutRule`); shape (256,)."""
    if profile.lut.arithmetic == "float32":
        inputs: Any = (CODES.astype(np.float32) - np.float32(source.zero_point)) * np.float32(source.scale)
        real: Any = function(inputs).astype(np.float32) * (np.float32(1) / np.float32(scale))
    else:
        real = function((CODES.astype(np.float64) - source.zero_point) * source.scale) / scale
    # Clipped while still real: an integer cannot hold what a wide function may yield. Where the function has
    # no value (the root of a negative code), the code of 0 stands.
    real = np.clip(np.nan_to_num(real, nan=0.0, posinf=1024.0, neginf=-1024.0), -1024.0, 1024.0)
    inside = out.zero_point if profile.lut.zero_point == "before_rounding" else 0
    real = real + real.dtype.type(inside)
    rounded = np.rint(real) if profile.lut.rounding == "half_even" else round_half_away(real)
    return to_int8(rounded.astype(np.int64) - inside, out)


def average(
    total: Int64Array,
    count: Int64Array,
    source: Quantization,
    scale: float,
    out: Output,
    operator: Literal["mean", "average_pool"],
    profile: Profile,
) -> Int8Array:
    """Average of windows from their sums.

    Args:
        total: sum of (code - zero point) over each window, int64.
        count: elements of each window, int64, >= 1, broadcasts with total.
        source: of the input.
        scale: of the output; the input's for "input_scale" and "reciprocal".
        out: zero point and clamp of the output.
        operator: whose rule of the profile it is.
        profile: the arithmetic.
    """
    rule: AverageRule = getattr(profile, operator)
    if rule.method == "input_scale":
        codes = total + count * source.zero_point
        return to_int8(_divide(codes, count, rule.rounding), Output(0, out.low, out.high))
    if rule.method == "reciprocal":
        return to_int8(_times_reciprocal(total, count), out)
    if rule.method == "float32_codes":
        factor = (np.float32(source.scale) / np.float32(scale)) * (np.float32(1) / count.astype(np.float32))
        return _float32_of_codes(total, count, np.asarray(factor), source, out)
    requantization = profile.requantize_in(operator)
    kind = requantization.multiplier
    if kind == "float32":
        return average_of_sums(total, count, source, scale, out)
    if kind == "float64":
        return to_int8(round_half_away(total * (source.scale / (scale * count))).astype(np.int64), out)
    if kind == "power_of_two":
        exponent = int(np.frexp(source.scale)[1] - np.frexp(scale)[1])
        numerator, denominator = total << max(exponent, 0), count << max(-exponent, 0)
        return to_int8(_divide(numerator, denominator, requantization.rounding), out)
    codes = np.empty(total.shape, np.int8)
    counts = np.broadcast_to(count, total.shape)
    for n in np.unique(counts):
        where = counts == n
        codes[where] = _mean_q31(total[where], int(n), source.scale, scale, out, requantization)
    return codes


def total(
    sums: Int64Array, count: int, source: Quantization, scale: float, out: Output, profile: Profile
) -> Int8Array:
    """A sum over axes (`SumRule`).

    Args:
        sums: of (code - zero point) over the axes, int64.
        count: elements of each sum.
        source: of the input.
        scale: of the output.
        out: zero point and clamp of the output.
        profile: the arithmetic.
    """
    if profile.reduce_sum.method == "requantize":
        return requantize(sums, make_multiplier(np.array(source.scale), scale, profile.requantize), out)
    factor = np.asarray(np.float32(source.scale) / np.float32(scale))
    if profile.reduce_sum.method == "float32_codes":
        return _float32_of_codes(sums, np.array(count), factor, source, out)
    codes = (sums + count * source.zero_point).astype(np.float32)
    real = codes * factor + np.float32(-source.zero_point) * factor * np.float32(count)
    return to_int8(np.copysign(np.floor(np.abs(real) + np.float32(0.5)), real).astype(np.int64), out)


def average_of_sums(
    total: Int64Array, count: Int64Array, source: Quantization, scale: float, out: Output
) -> Int8Array:
    """Average as ONNX Runtime's QLinearGlobalAveragePool computes it: one float32 factor, half to even.

    Args: see `average`.
    """
    factor = np.float32(source.scale) / (np.float32(scale) * count.astype(np.float32))
    return to_int8(np.rint(total.astype(np.float32) * factor).astype(np.int64), out)


def average_float32(
    windows: Iterable[Int8Array], count: Int64Array, source: Quantization, scale: float, out: Output
) -> Int8Array:
    """Average as ONNX Runtime's QLinearAveragePool computes it: every step rounds to float32.

    Args:
        windows: for each position in the window, row by row, what it covers: codes, the zero point for
            padding.
        count: elements of each window, broadcasts.
        source: of the input.
        scale: of the output.
        out: zero point and clamp of the output.
    """
    total = np.zeros(1, np.float32)
    for codes in windows:
        total = total + (codes.astype(np.float32) - np.float32(source.zero_point)) * np.float32(source.scale)
    real = total / count.astype(np.float32) / np.float32(scale) + np.float32(out.zero_point)
    return to_int8(np.rint(real).astype(np.int64) - out.zero_point, out)


def _float32_of_codes(
    total: Int64Array, count: Int64Array, factor: npt.NDArray[Any], source: Quantization, out: Output
) -> Int8Array:
    """XNNPACK's qs8 reductions: the codes' own sum times a factor, the zero points in one float32 offset."""
    zero_points = count * source.zero_point
    offset = np.float32(out.zero_point) - zero_points.astype(np.float32) * factor
    real = (total + zero_points).astype(np.float32) * factor + offset
    return to_int8(np.rint(real).astype(np.int64) - out.zero_point, out)


def _mean_q31(
    total: Int64Array, count: int, source: float, scale: float, out: Output, rule: RequantizeRule
) -> Int8Array:
    """TFLite's integer mean: 1/count is folded into the Q31 mantissa, with as many bits as fit in 32."""
    multiplier = make_multiplier(np.array(source), scale, rule)
    exponent = 31 - int(multiplier.shift)
    bits = max(0, min(count.bit_length() - 1, 32, 31 + exponent))
    mantissa = np.array((int(multiplier.mantissa) << bits) // count)
    folded = type(multiplier)(multiplier.rule, mantissa, multiplier.shift + bits, multiplier.factor)
    return requantize(total, folded, out)


def _times_reciprocal(total: Int64Array, count: Int64Array) -> Int64Array:
    """TOSA's AVG_POOL2D: reciprocal_scale(count), then apply_scale_32 with a single rounding."""
    bits = np.ceil(np.log2(count)).astype(np.int64)
    mantissa = (np.int64((1 << 30) + 1) << bits) // count
    rounded: Int64Array = (total * mantissa + (np.int64(1) << (29 + bits))) >> (30 + bits)
    return rounded


def _divide(numerator: Int64Array, denominator: Int64Array, rounding: str) -> Int64Array:
    """Numerator / denominator, denominator > 0, rounded."""
    if rounding == "floor":
        return numerator // denominator
    if rounding == "half_up":
        return (2 * numerator + denominator) // (2 * denominator)
    away: Int64Array = np.sign(numerator) * ((2 * np.abs(numerator) + denominator) // (2 * denominator))
    if rounding == "half_away":
        return away
    tie = 2 * np.abs(numerator) % (2 * denominator) == denominator
    even: Int64Array = np.where(tie & (away % 2 != 0), away - np.sign(numerator), away)
    return even
