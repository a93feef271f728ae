"""Logistic and tanh in 32-bit fixed point, as TensorFlow Lite Micro computes them (gemmlowp's fixedpoint.h).

A raw number stands for raw * 2^(integer bits - 31); a name ends with its integer bits, `x_q4`.
"""

import numpy as np

from npu_server.numerics.requantize import Output, divide_by_power, to_int8
from npu_server.numerics.scales import Int64Array, Quantization
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Int8Array

_INT32_MIN, _INT32_MAX = -(1 << 31), (1 << 31) - 1
_INPUT_BITS = 4
# e^(-2^k), k = -2 .. 4, without integer bits.
_EXPONENTIALS = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)


def sigmoid_table(source: Quantization, out: Output) -> Int8Array:
    """For each code of the input the code of its logistic at scale 1/256, zero point -128; shape (256,)."""
    x_q4, far = _input(source)
    positive = _shift(_two_over_one_plus(_exp_on_negatives(-np.abs(x_q4), _INPUT_BITS)), 1)
    value = np.where(x_q4 > 0, positive, _INT32_MAX - positive)
    value = np.where(x_q4 == 0, 1 << 30, value)
    return _codes(divide_by_power(value, np.array(23), "half_away"), far, out)


def tanh_table(source: Quantization, out: Output) -> Int8Array:
    """For each code of the input the code of its tanh at scale 1/128 and zero point 0; shape (256,)."""
    x_q4, far = _input(source)
    # The same raw number with one more integer bit is twice as much.
    twice_q2 = _two_over_one_plus(_exp_on_negatives(-np.abs(x_q4), _INPUT_BITS + 1))
    value = np.sign(x_q4) * _shift(twice_q2 - (1 << 29), 2)
    return _codes(divide_by_power(value, np.array(24), "half_away"), far, out)


def _input(source: Quantization) -> tuple[Int64Array, Int64Array]:
    """Each code in Q4, and -1 or 1 where it lies beyond 16 and the result is the lowest or highest code."""
    fraction, exponent = np.frexp(source.scale * 2.0 ** (31 - _INPUT_BITS))
    mantissa, shift = int(np.floor(fraction * 2.0**31 + 0.5)), int(exponent)
    radius = int(np.floor((2**_INPUT_BITS - 1) * 2.0 ** (31 - _INPUT_BITS - shift)))
    centred = np.arange(INT8_MIN, INT8_MAX + 1) - source.zero_point
    far = np.where(np.abs(centred) >= radius, np.where(centred <= -radius, -1, 1), 0)
    near = np.where(far == 0, centred, 0)
    raised = near << max(shift, 0)
    raw = divide_by_power(
        _product(raised, np.array(mantissa)), np.array(min(max(-shift, 0), 62)), "half_away"
    )
    return raw, far


def _codes(rounded: Int64Array, far: Int64Array, out: Output) -> Int8Array:
    codes = to_int8(rounded, out).astype(np.int64)
    codes = np.where(far < 0, INT8_MIN, np.where(far > 0, INT8_MAX, codes))
    return np.clip(codes, out.low, out.high).astype(np.int8)


def _product(a: Int64Array, b: Int64Array) -> Int64Array:
    """SaturatingRoundingDoublingHighMul: C++ divides towards zero after a nudge by sign."""
    product = a * b
    nudged = product + np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    rounded: Int64Array = np.minimum(np.sign(nudged) * (np.abs(nudged) >> 31), _INT32_MAX)
    return rounded


def _shift(value: Int64Array, bits: int) -> Int64Array:
    """Times 2^bits, saturating; half away from zero where bits is negative."""
    if bits < 0:
        return divide_by_power(value, np.array(-bits), "half_away")
    shifted: Int64Array = np.clip(value << bits, _INT32_MIN, _INT32_MAX)
    return shifted


def _exp_on_negatives(x: Int64Array, integer_bits: int) -> Int64Array:
    """e^x for x <= 0: what is left of quarters by a polynomial, then a factor for each bit."""
    fractional_bits = 31 - integer_bits
    quarter = 1 << (fractional_bits - 2)
    rest = (x & (quarter - 1)) - quarter
    result = _exp_in_a_quarter(_shift(rest, integer_bits))
    remainder = rest - x
    for exponent, factor in zip(range(-2, 5), _EXPONENTIALS, strict=True):
        if integer_bits > exponent:
            bit = (remainder >> (fractional_bits + exponent)) & 1
            result = np.where(bit == 1, _product(result, np.array(factor)), result)
    return np.where(x == 0, _INT32_MAX, result)


def _exp_in_a_quarter(a: Int64Array) -> Int64Array:
    """e^a for a in [-1/4, 0): four terms around -1/8."""
    at_eighth, third = np.array(1895147668), np.array(715827883)
    x = a + (1 << 28)
    square = _product(x, x)
    cube, fourth = _product(square, x), _product(square, square)
    higher = _shift(_product(_shift(fourth, -2) + cube, third) + square, -1)
    return at_eighth + _product(at_eighth, x + higher)


def _two_over_one_plus(a: Int64Array) -> Int64Array:
    """2 / (1 + a) in Q2 for a in [0, 1], by three steps of Newton's method."""
    half_denominator = (a + _INT32_MAX + 1) >> 1
    x_q2 = 1515870810 + _product(half_denominator, np.array(-1010580540))
    for _ in range(3):
        missing = (1 << 29) - _product(half_denominator, x_q2)
        x_q2 = x_q2 + _shift(_product(x_q2, missing), 2)
    return x_q2
