"""From an accumulator to an INT8 code: the specification, in NumPy int64, one step a line."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_server.numerics.rules import AccumulatorRule, RequantizeRule
from npu_server.numerics.scales import Float64Array, Int64Array, round_half_away
from npu_wire.errors import InvalidInput
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Int8Array


@dataclass(frozen=True)
class Multiplier:
    """The ratio accumulator scale / output scale, as the NPU holds it; one entry a channel.

    Attributes:
        rule: what the numbers mean and how they round.
        mantissa: Q31 integer in [2^30, 2^31) or 0; 1 for a power of two. int64, shape (channels,).
        shift: the product is divided by 2^shift; negative where it is multiplied. int64, shape (channels,).
        factor: the ratio as float32, or as float64 where the rule says so, shape (channels,).
    """

    rule: RequantizeRule
    mantissa: Int64Array
    shift: Int64Array
    factor: npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Output:
    """What happens after rounding: the zero point is added, the code is clamped to [low, high]."""

    zero_point: int
    low: int = INT8_MIN
    high: int = INT8_MAX


def make_multiplier(numerator: Float64Array, denominator: float, rule: RequantizeRule) -> Multiplier:
    """Encodes numerator / denominator.

    Q31 as TFLite's QuantizeMultiplier: (m, e) = frexp(ratio), mantissa = round(m * 2^31), 0 where e < -31.

    Args:
        numerator: shape (channels,), > 0: product of the scales that go in.
        denominator: scale that comes out.
        rule: the arithmetic.

    Raises:
        InvalidInput: a ratio of 2^30 or more, which no NPU can hold.
    """
    ratio = np.asarray(numerator, np.float64) / denominator
    if not (np.isfinite(ratio).all() and (ratio < 2.0**30).all()):
        raise InvalidInput(
            f"scale ratio {ratio.max():g} is 2^30 or more; weights or ranges are out of proportion; "
            "calibrate again, and look for weights far larger than the others"
        )
    # float32 engines multiply and divide in float32, in this order.
    factor = (np.asarray(numerator).astype(np.float32) / np.float32(denominator)).astype(np.float32)
    fraction, exponent = np.frexp(factor.astype(np.float64) if rule.ratio == "float32" else ratio)
    held = ratio if rule.multiplier == "float64" else factor
    if rule.multiplier == "power_of_two":
        mantissa = np.ones(ratio.shape, np.int64)
        shift = 1 - exponent.astype(np.int64)
    else:
        mantissa = np.floor(fraction * 2.0**31 + 0.5).astype(np.int64)
        overflow = mantissa == 2**31
        mantissa = np.where(overflow, 2**30, mantissa)
        exponent = exponent + overflow
        mantissa = np.where(exponent < -31, 0, mantissa)
        shift = np.where(exponent < -31, 31, 31 - exponent.astype(np.int64))
    return Multiplier(rule, mantissa, shift, held)


def accumulate(total: Int64Array, rule: AccumulatorRule) -> Int64Array:
    """What a register of `rule.bits` holds of an exact sum."""
    limit = 1 << (rule.bits - 1)
    if rule.overflow == "saturate":
        return np.clip(total, -limit, limit - 1)
    return ((total + limit) & (2 * limit - 1)) - limit


def saturating_sum(start: Int64Array, products: Iterable[Int64Array], rule: AccumulatorRule) -> Int64Array:
    """A register that overflows on every addition, in the order of the products.

    Args:
        start: what it begins with, the bias; broadcasts with the products.
        products: one addition each.
        rule: the register.
    """
    total = start
    for product in products:
        total = accumulate(total + product, rule)
    return total


def scale_and_round(value: Int64Array, multiplier: Multiplier) -> Int64Array:
    """Multiplies and rounds to an integer by the rule; the last axis of value is the channels."""
    rule = multiplier.rule
    if rule.multiplier == "float32":
        rounded: Int64Array = np.rint(value.astype(np.float32) * multiplier.factor).astype(np.int64)
        return rounded
    if rule.multiplier == "float64":
        away: Int64Array = round_half_away(value.astype(np.float64) * multiplier.factor).astype(np.int64)
        return away
    if rule.multiplier == "power_of_two":
        right = np.clip(multiplier.shift, 0, 62)
        left = np.clip(-multiplier.shift, 0, 30)
        return divide_by_power(value << left, right, rule.rounding)
    product = value * multiplier.mantissa
    if rule.steps == 1:
        return divide_by_power(product, multiplier.shift, rule.rounding)
    # gemmlowp: a doubling high multiplication rounds to 31 bits, then what is left of the shift rounds once
    # more. A left shift (ratio > 1) precedes the multiplication, so its rounding works on that many bits
    # less.
    high = divide_by_power(product, np.minimum(multiplier.shift, 31), "half_up")
    return divide_by_power(high, np.maximum(multiplier.shift - 31, 0), rule.rounding)


def requantize(value: Int64Array, multiplier: Multiplier, output: Output) -> Int8Array:
    """INT8 codes of accumulators; the last axis of value is the multiplier's channels."""
    return to_int8(scale_and_round(value, multiplier), output)


def to_int8(rounded: Int64Array, output: Output) -> Int8Array:
    """Adds the zero point and clamps."""
    return np.clip(rounded + output.zero_point, output.low, output.high).astype(np.int8)


def divide_by_power(value: Int64Array, shift: Int64Array, rounding: str) -> Int64Array:
    """Value / 2^shift with shift >= 0, by a rounding of `RequantizeRule` other than "half_even"."""
    half = (np.int64(1) << shift) >> 1
    if rounding == "floor":
        return value >> shift
    if rounding == "half_up":
        return (value + half) >> shift
    assert rounding == "half_away"
    rounded: Int64Array = np.sign(value) * ((np.abs(value) + half) >> shift)
    return rounded
