"""How large an integer sum can become."""

import numba
import numpy as np

from npu_server.numerics.scales import Int64Array
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Int8Array


def largest_sum(codes: Int8Array, zero_point: int) -> int:
    """Bound on the magnitude of every partial sum of products, in whatever order they are added.

    A centred input lies in [-128 - zero point, 127 - zero point]; both ends have their sign, so no partial
    sum exceeds the sum of the positive products' maxima or falls below that of the negative products' minima.

    Args:
        codes: weights, int8, shape (out, ...).
        zero_point: of the input.
    """
    return int(largest_sums(codes, zero_point).max())


def largest_sums(codes: Int8Array, zero_point: int) -> Int64Array:
    """The same of each output, shape (out,)."""
    low, high = INT8_MIN - zero_point, INT8_MAX - zero_point
    positive, negative = signed_sums(codes)
    above = high * positive + low * negative
    below = low * positive + high * negative
    largest: Int64Array = np.maximum(above, -below)
    return largest


def signed_sums(codes: Int8Array) -> tuple[Int64Array, Int64Array]:
    """Sums of the positive and of the negative weights of each row, shape (out,) each."""
    rows = np.ascontiguousarray(codes).reshape(len(codes), -1)
    positive, total = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    _sum_rows(rows, positive, total)
    return positive, total - positive


@numba.njit(nogil=True, cache=True)
def _sum_rows(rows, positive, total):  # type: ignore[no-untyped-def]
    for row in range(rows.shape[0]):
        above, everything = np.int32(0), np.int32(0)
        for value in rows[row]:
            above += np.int32(max(value, 0))
            everything += np.int32(value)
        positive[row], total[row] = above, everything
