"""What a host computes in floating point between layers of an NPU: float64 in NumPy, one definition for all.

Both backends call these very functions, so that no two implementations of a float sum stand side by side. A
reduced axis is brought to the end and made contiguous first: NumPy's order of additions depends on how an
array lies in memory, and must not.
"""

from collections.abc import Callable

import numpy as np

from npu_server.numerics.requantize import Output
from npu_server.numerics.scales import Float64Array, Quantization
from npu_wire.layer_map import Int8Array


def dequantize(codes: Int8Array, q: Quantization) -> Float64Array:
    """(code - zero point) * scale in float64, exact."""
    return (codes.astype(np.float64) - q.zero_point) * q.scale


def quantize(real: Float64Array, scale: float, out: Output) -> Int8Array:
    """Round half even (real / scale) + zero point, clamped; what is no number becomes the code of 0."""
    steps = np.nan_to_num(real / scale, nan=0.0, posinf=1024.0, neginf=-1024.0)
    codes = np.rint(np.clip(steps, -1024.0, 1024.0)).astype(np.int64) + out.zero_point
    return np.clip(codes, out.low, out.high).astype(np.int8)


def softmax(x: Float64Array, axis: int) -> Float64Array:
    """exp(x - max) / sum(exp(x - max)) along an axis."""

    def compute(v: Float64Array) -> Float64Array:
        powers = _exponentials(v)
        shares: Float64Array = powers / powers.sum(axis=-1, keepdims=True)
        return shares

    return _along_last(x, (axis,), compute)


def log_softmax(x: Float64Array, axis: int) -> Float64Array:
    """Logarithm of the softmax along an axis."""

    def compute(v: Float64Array) -> Float64Array:
        shifted = v - v.max(axis=-1, keepdims=True)
        logs: Float64Array = shifted - np.log(_exponentials(v).sum(axis=-1, keepdims=True))
        return logs

    return _along_last(x, (axis,), compute)


def normalize(x: Float64Array, axes: tuple[int, ...], epsilon: float) -> Float64Array:
    """(x - mean) / sqrt(variance + epsilon) over some axes together (LayerNormalization and its kin)."""

    def compute(v: Float64Array) -> Float64Array:
        centred = v - v.mean(axis=-1, keepdims=True)
        scaled: Float64Array = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + epsilon)
        return scaled

    return _along_last(x, axes, compute)


def root_mean_square(x: Float64Array, axes: tuple[int, ...], epsilon: float) -> Float64Array:
    """X / sqrt(mean(x^2) + epsilon) over some axes together (RMSNormalization)."""
    return _along_last(x, axes, lambda v: v / np.sqrt(np.square(v).mean(axis=-1, keepdims=True) + epsilon))


def _exponentials(v: Float64Array) -> Float64Array:
    result: Float64Array = np.exp(v - v.max(axis=-1, keepdims=True))
    return result


def _along_last(
    x: Float64Array, axes: tuple[int, ...], compute: Callable[[Float64Array], Float64Array]
) -> Float64Array:
    """Applies a function of rows to the axes, joined into the last one."""
    ends = tuple(range(x.ndim - len(axes), x.ndim))
    moved = np.moveaxis(x, axes, ends)
    rows = np.ascontiguousarray(moved).reshape(*moved.shape[: x.ndim - len(axes)], -1)
    return np.moveaxis(compute(rows).reshape(moved.shape), ends, axes)
