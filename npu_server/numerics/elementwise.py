"""Additions, products, concatenation operands, tables and averages of INT8 tensors, in NumPy."""

from collections.abc import Callable, Iterable

import numpy as np

from npu_server.numerics.profile import AverageRule, Profile
from npu_server.numerics.requantize import Output, make_multiplier, requantize, scale_and_round, to_int8
from npu_server.numerics.scales import Float64Array, Int64Array, Quantization
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Int8Array

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
) -> Int8Array:
    """Sum of two INT8 tensors that broadcast, in the output's scale (`AddRule`)."""
    x, y = a.astype(np.int64) - qa.zero_point, b.astype(np.int64) - qb.zero_point
    rule = profile.requantize
    if profile.add.method == "int8":
        x = to_int8(scale_and_round(x, make_multiplier(np.array(qa.scale), scale, rule)), Output(0)).astype(
            np.int64
        )
        y = to_int8(scale_and_round(y, make_multiplier(np.array(qb.scale), scale, rule)), Output(0)).astype(
            np.int64
        )
        return to_int8(x + y, out)
    if profile.add.method == "shifted_int32":
        common = 2 * max(qa.scale, qb.scale)
        bits = profile.add.left_shift
        x = scale_and_round(x << bits, make_multiplier(np.array(qa.scale), common, rule))
        y = scale_and_round(y << bits, make_multiplier(np.array(qb.scale), common, rule))
        return requantize(x + y, make_multiplier(np.array(common), 2.0**bits * scale, rule), out)
    return _add_float32(a, qa, b, qb, scale, out)


def _add_float32(
    a: Int8Array, qa: Quantization, b: Int8Array, qb: Quantization, scale: float, out: Output
) -> Int8Array:
    """ONNX Runtime's MlasQLinearAdd: zero points in one constant, two fused multiply-adds, half to even."""
    ratio_a = np.float32(qa.scale) / np.float32(scale)
    ratio_b = np.float32(qb.scale) / np.float32(scale)
    offset = np.float32(out.zero_point) - (
        ratio_a * np.float32(qa.zero_point) + ratio_b * np.float32(qb.zero_point)
    )
    # float64 holds product and sum of such numbers without loss, so that one rounding to float32 is the fused
    # one.
    first = (a.astype(np.float64) * np.float64(ratio_a) + np.float64(offset)).astype(np.float32)
    second = (b.astype(np.float64) * np.float64(ratio_b) + first.astype(np.float64)).astype(np.float32)
    return np.clip(np.rint(second), out.low, out.high).astype(np.int8)


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
    if profile.requantize.multiplier == "float32":
        factor = np.float32(qa.scale) * np.float32(qb.scale) / np.float32(scale)
        real = product.astype(np.float32) * factor
        if profile.mul.zero_point == "before_rounding":
            return to_int8(np.rint(real + np.float32(out.zero_point)).astype(np.int64) - out.zero_point, out)
        return to_int8(np.rint(real).astype(np.int64), out)
    return requantize(product, make_multiplier(np.array(qa.scale * qb.scale), scale, profile.requantize), out)


def rescale_table(source: Quantization, scale: float, out: Output, profile: Profile) -> Int8Array:
    """For each code of one scale the code in another, by the requantize rule; shape (256,)."""
    if source == Quantization(scale, out.zero_point):
        return np.clip(CODES, out.low, out.high).astype(np.int8)
    multiplier = make_multiplier(np.array(source.scale), scale, profile.requantize)
    return requantize(CODES.astype(np.int64) - source.zero_point, multiplier, out)


def concat_table(source: Quantization, scale: float, out: Output, profile: Profile) -> Int8Array:
    """For each code of an operand the code in the output's scale (`ConcatRule`); shape (256,)."""
    if profile.concat.method == "requantize":
        return rescale_table(source, scale, out, profile)
    real = (CODES.astype(np.float32) - np.float32(source.zero_point)) * np.float32(source.scale)
    return to_int8(np.rint(real / np.float32(scale)).astype(np.int64), out)


def function_table(
    function: Callable[[Float64Array], Float64Array],
    source: Quantization,
    scale: float,
    out: Output,
    profile: Profile,
) -> Int8Array:
    """For each code the code of a function's value, computed in float64; shape (256,)."""
    real = function((CODES.astype(np.float64) - source.zero_point) * source.scale) / scale
    # Clipped while still real: an integer cannot hold what a wide function may yield.
    real = np.clip(real, -1024.0, 1024.0)
    if profile.lut.rounding == "half_even":
        rounded = np.rint(real)
    else:
        rounded = np.copysign(np.floor(np.abs(real) + 0.5), real)
    return to_int8(rounded.astype(np.int64), out)


def average(
    total: Int64Array,
    count: Int64Array,
    source: Quantization,
    scale: float,
    out: Output,
    rule: AverageRule,
    profile: Profile,
) -> Int8Array:
    """Average of windows from their sums.

    Args:
        total: sum of (code - zero point) over each window, int64.
        count: elements of each window, int64, >= 1, broadcasts with total.
        source: of the input.
        scale: of the output; the input's for "input_scale".
        out: zero point and clamp of the output.
        rule: of this operator.
        profile: the arithmetic.
    """
    if rule.method == "input_scale":
        codes = total + count * source.zero_point
        return to_int8(_divide(codes, count, rule.rounding), Output(0, out.low, out.high))
    kind = profile.requantize.multiplier
    if kind == "float32":
        factor = np.float32(source.scale) / (np.float32(scale) * count.astype(np.float32))
        return to_int8(np.rint(total.astype(np.float32) * factor).astype(np.int64), out)
    if kind == "power_of_two":
        exponent = int(np.frexp(source.scale)[1] - np.frexp(scale)[1])
        numerator, denominator = total << max(exponent, 0), count << max(-exponent, 0)
        return to_int8(_divide(numerator, denominator, profile.requantize.rounding), out)
    codes = np.empty(total.shape, np.int8)
    counts = np.broadcast_to(count, total.shape)
    for n in np.unique(counts):
        where = counts == n
        codes[where] = _mean_q31(total[where], int(n), source.scale, scale, out, profile)
    return codes


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


def _mean_q31(
    total: Int64Array, count: int, source: float, scale: float, out: Output, profile: Profile
) -> Int8Array:
    """TFLite's integer mean: 1/count is folded into the Q31 mantissa, with as many bits as fit in 32."""
    multiplier = make_multiplier(np.array(source), scale, profile.requantize)
    exponent = 31 - int(multiplier.shift)
    bits = max(0, min(count.bit_length() - 1, 32, 31 + exponent))
    mantissa = np.array((int(multiplier.mantissa) << bits) // count)
    folded = type(multiplier)(multiplier.rule, mantissa, multiplier.shift + bits, multiplier.factor)
    return requantize(total, folded, out)


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
