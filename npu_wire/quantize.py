"""The one rule by which real numbers become codes and codes real numbers, on both sides of the wire."""

import numpy as np

from npu_wire.errors import NonFiniteInput
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Float32Array, Int8Array


def quantize(x: Float32Array, scale: float, zero_point: int) -> Int8Array:
    """Codes of real numbers: clip(round_half_even(x / scale) + zero_point) in float32 (ONNX QuantizeLinear).

    Args:
        x: shape (...), float32, finite.
        scale: real value of one LSB, > 0.
        zero_point: code of real 0.

    Returns:
        int8 of the same shape.

    Raises:
        NonFiniteInput: x holds NaN or infinity.
    """
    if not np.isfinite(x).all():
        raise NonFiniteInput(
            f"input of shape {x.shape} holds NaN or infinity; clean the batch before it is quantized"
        )
    codes = np.rint(x / np.float32(scale)) + np.float32(zero_point)
    clipped: Int8Array = np.clip(codes, INT8_MIN, INT8_MAX).astype(np.int8)
    return clipped


def dequantize(q: Int8Array, scale: float, zero_point: int) -> Float32Array:
    """Real numbers of codes: (q - zero_point) * scale, one float32 rounding (ONNX DequantizeLinear)."""
    return (q.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)
