"""Sliding windows on NumPy arrays, and the averages over them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_server.compile.graph import AveragePool, Window
from npu_server.compile.planning.lowering import Layer
from npu_server.numerics.elementwise import average, average_float32, average_of_sums
from npu_server.numerics.profile import Profile
from npu_server.numerics.scales import Int64Array
from npu_wire.layer_map import Int8Array


def positions(x: npt.NDArray[Any], window: Window, fill: int) -> Iterator[npt.NDArray[Any]]:
    """For each position in the window, row by row, the elements that it meets.

    Args:
        x: shape (N, C, height, width).
        window: the window.
        fill: what padding holds.

    Yields:
        Views of shape (N, C, output height, output width).
    """
    top, left, bottom, right = window.pads
    below, beside = window.overhang
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom + below), (left, right + beside)), constant_values=fill)
    height, width = window.output_size(x.shape[2], x.shape[3])
    (down, across), (rows_apart, columns_apart) = window.strides, window.dilations
    for i in range(window.size[0]):
        for j in range(window.size[1]):
            rows = slice(i * rows_apart, i * rows_apart + (height - 1) * down + 1, down)
            columns = slice(j * columns_apart, j * columns_apart + (width - 1) * across + 1, across)
            yield padded[:, :, rows, columns]


def window_counts(operator: AveragePool, size: tuple[int, int]) -> Int64Array:
    """Elements that count in each window, shape (1, 1, output height, output width)."""
    inside, window = np.ones((1, 1, *size), np.int64), operator.window
    if operator.count_pads:
        # What hangs over the padding (ceil_mode) does not count even then.
        top, left, bottom, right = window.pads
        inside = np.ones((1, 1, size[0] + top + bottom, size[1] + left + right), np.int64)
        window = Window(window.size, window.strides, (0, 0, 0, 0), window.dilations, window.overhang)
    counts: Int64Array = np.sum(list(positions(inside, window, 0)), axis=0)
    return np.maximum(counts, 1)


def average_windows(layer: Layer, operator: AveragePool, x: Int8Array, profile: Profile) -> Int8Array:
    """An average pool on codes of shape (N, C, height, width)."""
    source, count = layer.sources[0], window_counts(operator, (x.shape[2], x.shape[3]))
    whole = operator.window.size == (x.shape[2], x.shape[3]) and not any(operator.window.pads)
    if profile.average_pool.method == "float32_sum" and not whole:
        windows = positions(x, operator.window, source.zero_point)
        return average_float32(windows, count, source, layer.scale, layer.output)
    total = np.zeros(1, np.int64)
    for codes in positions(x.astype(np.int64) - source.zero_point, operator.window, 0):
        total = total + codes
    if profile.average_pool.method == "float32_sum":
        return average_of_sums(total, count, source, layer.scale, layer.output)
    return average(total, count, source, layer.scale, layer.output, "average_pool", profile)
