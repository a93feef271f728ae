"""Hard swish in 16-bit fixed point, as TFLite's integer kernels compute it."""

import numpy as np

from npu_server.numerics.requantize import Output, to_int8
from npu_server.numerics.scales import Int64Array, Quantization
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Int8Array

_INT16_MIN, _INT16_MAX = -(1 << 15), (1 << 15) - 1


def hard_swish_table(source: Quantization, scale: float, out: Output) -> Int8Array:
    """For each code of the input the code of x * relu6(x + 3) / 6, `HardSwish` of TFLite's reference ops.

    Args:
        source: of the input.
        scale: of the output.
        out: zero point and clamp of the output.

    Returns:
        shape (256,).
    """
    fine_scale = float(np.float32(1 / 128) * np.float32(source.scale))
    multiplier, exponent = _int16_multiplier(float(np.float32(fine_scale) / np.float32(scale)))
    slope, slope_exponent = _int16_multiplier(float(np.float32(fine_scale) / np.float32(3 / 32768)))
    fine = (np.arange(INT8_MIN, INT8_MAX + 1) - source.zero_point) << 7
    scaled = _rounding_high_product(fine, multiplier)
    gate = fine
    if slope_exponent > 0:
        gate = _saturate(gate << (slope_exponent - 1))
    gate = _rounding_high_product(gate, slope)
    if slope_exponent > 0:
        gate = _saturate(gate << 1)
    if slope_exponent < 0:
        gate = _divide_by_power(gate, -slope_exponent)
    # From [-1, 1] to [0, 1].
    gate = (gate + (1 << 15)) >> 1
    product = gate * scaled
    # C++ divides towards zero.
    return to_int8(_divide_by_power(np.sign(product) * (np.abs(product) >> 15), -exponent), out)


def _int16_multiplier(ratio: float) -> tuple[int, int]:
    """QuantizeMultiplier, then DownScaleInt32ToInt16Multiplier."""
    fraction, exponent = np.frexp(ratio)
    mantissa = int(np.floor(fraction * 2.0**31 + 0.5))
    mantissa, exponent = (1 << 30, int(exponent) + 1) if mantissa == 1 << 31 else (mantissa, int(exponent))
    return (_INT16_MAX if mantissa >= (1 << 31) - (1 << 15) else (mantissa + (1 << 15)) >> 16), exponent


def _rounding_high_product(value: Int64Array, multiplier: int) -> Int64Array:
    """SaturatingRoundingDoublingHighMul on 16 bits: C++ divides towards zero after a nudge by sign."""
    product = value * multiplier
    nudged = product + np.where(product >= 0, 1 << 14, 1 - (1 << 14))
    rounded: Int64Array = np.sign(nudged) * (np.abs(nudged) >> 15)
    return rounded


def _saturate(value: Int64Array) -> Int64Array:
    return np.clip(value, _INT16_MIN, _INT16_MAX)


def _divide_by_power(value: Int64Array, exponent: int) -> Int64Array:
    """RoundingDivideByPOT: half away from zero; a negative exponent multiplies."""
    if exponent <= 0:
        return _saturate(value << -exponent)
    exponent = min(exponent, 62)  # nothing is left of 32 bits long before
    half = 1 << (exponent - 1)
    rounded: Int64Array = np.sign(value) * ((np.abs(value) + half) >> exponent)
    return rounded
