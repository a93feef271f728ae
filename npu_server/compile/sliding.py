"""Sliding windows on NumPy arrays."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_server.compile.graph import AveragePool, Window


def window_counts(kernel: AveragePool, size: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Elements that count in each window, shape (1, 1, height, width)."""
    window = kernel.window
    inside = np.ones((1, 1, *size), np.int64)
    top, left, bottom, right = window.pads
    if kernel.count_pads:
        padded = np.pad(inside, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=1)
        unpadded = Window(window.kernel, window.strides, (0, 0, 0, 0), window.dilations, window.overhang)
        inside, window = padded, unpadded
    counts: npt.NDArray[np.int64] = np.sum(list(positions(inside, window, 0)), axis=0)
    return np.maximum(counts, 1)


def positions(x: npt.NDArray[Any], window: Window, fill: int) -> Iterator[npt.NDArray[Any]]:
    """For each position in the window the elements that it meets.

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
    for i in range(window.kernel[0]):
        for j in range(window.kernel[1]):
            rows = slice(
                i * window.dilations[0], i * window.dilations[0] + (height - 1) * window.strides[0] + 1
            )
            columns = slice(
                j * window.dilations[1], j * window.dilations[1] + (width - 1) * window.strides[1] + 1
            )
            yield padded[:, :, rows, columns][:, :, :: window.strides[0], :: window.strides[1]]
