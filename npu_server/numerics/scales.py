"""Scales and zero points of activations, INT8 codes of weights and biases."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_server.numerics.profile import Profile
from npu_wire.errors import InvalidInput
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Float32Array, Int8Array

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

# float32 has subnormal numbers below; a ratio of such scales loses bits.
_SMALLEST_SCALE = 2.0**-100
_LARGEST_SCALE = 2.0**100
LARGEST_WEIGHT = 127
"""Largest magnitude of a weight's code."""
LARGEST_BIAS = 2**30
"""Of a bias's code: half of what 32 bits hold, so that the sum of the products has room beside it."""


@dataclass(frozen=True)
class Quantization:
    """real = (q - zero_point) * scale; scale is a float32 number."""

    scale: float
    zero_point: int


def activation_quantization(name: str, low: float, high: float, profile: Profile) -> Quantization:
    """Scale and zero point that cover a range, widened to contain 0.

    Affine: scale = (high - low) / 255, zero point = round(-128 - low / scale). Symmetric: max(-low, high) /
        127, 0.

    Args:
        name: value name, for messages.
        low: smallest real value.
        high: largest real value.
        profile: the arithmetic.

    Raises:
        InvalidInput: the range is not finite, of zero width, or no float32 scale fits it.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InvalidInput(
            f"range of {name!r} is not finite: [{low}, {high}]; calibrate again with finite data"
        )
    if low >= high:
        raise InvalidInput(
            f"range of {name!r} has no width: [{low}, {high}]; calibrate with data that varies"
        )
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    affine = profile.activations.kind == "affine"
    exact = (high - low) / 255 if affine else max(-low, high) / 127
    if not _SMALLEST_SCALE <= exact <= _LARGEST_SCALE:
        raise InvalidInput(
            f"range of {name!r}, [{low}, {high}], is too narrow or too wide for a float32 scale"
        )
    if profile.activations.scale == "power_of_two":
        exact = float(power_of_two_above(np.array([exact]))[0])
    scale = float(np.float32(exact))
    zero_point = int(np.clip(np.rint(INT8_MIN - low / scale), INT8_MIN, INT8_MAX)) if affine else 0
    return Quantization(scale, zero_point)


def power_of_two_above(x: Float64Array) -> Float64Array:
    """2**ceil(log2(x)), exact, for x > 0."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(1.0, exponent - (mantissa == 0.5))  # type: ignore[no-any-return]


def round_half_away(real: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """To whole numbers, ties away from zero, as C's round: adding a half would lift 0.49999997 to 1.

    Args:
        real: float32 or float64.
    """
    size = np.abs(real)
    below = np.floor(size)
    return np.copysign(below + (size - below >= 0.5), real)  # type: ignore[no-any-return]


def code_of(x: float, q: Quantization, bounds: str = "half_away") -> int:
    """Code of a bound, not clipped to INT8.

    Args:
        x: the bound.
        q: of the tensor.
        bounds: `ActivationRule.bounds`; TFLite's own kernels round half away.
    """
    with np.errstate(over="ignore"):  # a bound that far away is as good as none
        ratio = np.clip(np.float32(x) / np.float32(q.scale), np.float32(-1e9), np.float32(1e9))
    if bounds == "half_even":
        return int(np.rint(ratio + np.float32(q.zero_point)))
    return int(round_half_away(np.asarray(ratio))) + q.zero_point


@dataclass(frozen=True)
class QuantizedWeights:
    """Weights and bias of a convolution or a fully connected layer.

    Attributes:
        codes: int8, shape (out, ...).
        scales: float32 numbers, shape (out,), float64.
        bias: in units of weight scale * input scale, shape (out,), int64.
    """

    codes: Int8Array
    scales: Float64Array
    bias: Int64Array


def quantize_weights(
    weight: Float32Array, bias: Float32Array, input_scale: float, output_scale: float, profile: Profile
) -> QuantizedWeights:
    """Scale = max|w| / 127 (rounded up where only powers of two exist), codes round half to even.

    The bias is round(b / (weight scale * input scale)), clipped to what the accumulator holds. Where that
    would exceed 2^30, because the weights are next to nothing beside the bias, the scale is larger so that it
    is 2^30 (as TFLite's converter keeps biases in half of their bits). Weights that are all zero have no
    scale; they take output scale / input scale, so that the bias counts in output codes.

    Args:
        weight: shape (out, ...), finite.
        bias: shape (out,), finite.
        input_scale: scale of the layer's input.
        output_scale: scale of the layer's output.
        profile: the arithmetic.
    """
    rows = weight.reshape(len(weight), -1)
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float64)
    holding_bias = np.abs(bias).astype(np.float64) / (input_scale * LARGEST_BIAS)
    if not profile.weights.per_channel:
        largest, holding_bias = (np.full_like(each, each.max()) for each in (largest, holding_bias))
    exact = np.maximum(largest / LARGEST_WEIGHT, holding_bias)
    exact = np.where(largest < _SMALLEST_SCALE, output_scale / input_scale, exact)
    if profile.weights.scale == "power_of_two":
        exact = power_of_two_above(exact)
    scales = exact.astype(np.float32)
    column = scales.reshape(-1, *[1] * (weight.ndim - 1))
    ratios = weight / column
    codes = np.clip(np.rint(ratios, out=ratios), -LARGEST_WEIGHT, LARGEST_WEIGHT, out=ratios).astype(np.int8)
    limit = 2.0 ** (profile.accumulator.bits - 1)
    steps = bias.astype(np.float64) / (scales.astype(np.float64) * input_scale)
    bias_codes = np.clip(np.rint(steps), -limit, limit - 1).astype(np.int64)
    return QuantizedWeights(codes, scales.astype(np.float64), bias_codes)
