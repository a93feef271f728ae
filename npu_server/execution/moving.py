"""Data movement and resizing on NumPy arrays of codes, (N, ...) in logical order."""

from typing import Any

import numpy as np
import numpy.typing as npt

from npu_server.compile.graph import Interpolate, Rearrange, Select, Stuffing
from npu_wire.layer_map import Int8Array

Array = npt.NDArray[Any]


def rearrange(x: Int8Array, operator: Rearrange) -> Int8Array:
    """Splits axes and transposes; the caller joins them again."""
    split = x.reshape(len(x), *operator.split)
    return split.transpose(0, *(axis + 1 for axis in operator.order))


def select(x: Int8Array, operator: Select) -> Int8Array:
    """Takes some elements along some axes."""
    for axis, indices in operator.indices:
        x = x.take(indices, axis=axis)
    return x


def interpolate(x: Int8Array, operator: Interpolate) -> Int8Array:
    """Bilinear resize in 20 fractional bits, rounded half away from zero (TFLite's ResizeBilinearInteger).

    The weights of the four neighbours make up 2^20, so that codes are weighed as they are and the zero point
    stays.
    """
    one = 1 << 10
    rows, columns = operator.rows, operator.columns
    down = np.array(rows.weight).reshape(-1, 1)
    across = np.array(columns.weight)
    upper, lower = x.astype(np.int64)[:, :, rows.lower], x.astype(np.int64)[:, :, rows.upper]
    upper = upper[..., columns.lower] * (one - across) + upper[..., columns.upper] * across
    lower = lower[..., columns.lower] * (one - across) + lower[..., columns.upper] * across
    total = upper * (one - down) + lower * down
    half = 1 << 19
    rounded: Int8Array = (np.sign(total) * ((np.abs(total) + half) >> 20)).astype(np.int8)
    return rounded


def stuff(x: Array, stuffing: Stuffing, fill: int) -> Array:
    """Spreads pixels apart and surrounds them (or cuts them off) before a transposed convolution.

    Args:
        x: shape (N, C, height, width).
        stuffing: distances and pads.
        fill: what lies between and around.
    """
    n, channels, height, width = x.shape
    (down, across), (top, left, bottom, right) = stuffing.strides, stuffing.pads
    spread = np.full((n, channels, (height - 1) * down + 1, (width - 1) * across + 1), fill, x.dtype)
    spread[:, :, ::down, ::across] = x
    pads = [(max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0))]
    padded = np.pad(spread, [(0, 0), (0, 0), *pads], constant_values=fill)
    rows = slice(max(-top, 0), padded.shape[2] - max(-bottom, 0))
    columns = slice(max(-left, 0), padded.shape[3] - max(-right, 0))
    return padded[:, :, rows, columns]
