"""The compiled loops of the injection: one pass over memory, in blocks that stay in the first-level cache.

Within a block the loops are simple enough for the compiler to turn them into vector instructions; one loop
that does all of it runs six times slower. They release the GIL, so tensors of later layers arrive meanwhile.
"""

from typing import Any

import numba
import numpy as np

_BLOCK = 1024  # elements; what a block reads and writes stays in the first-level cache


@numba.njit(nogil=True, cache=True)
def inject_pass(
    y: Any,
    q: Any,
    scale: Any,
    zero_point: Any,
    limit: Any,
    low: Any,
    high: Any,
    lower: Any,
    upper: Any,
    out: Any,
    mask: Any,
    sums: Any,
    counts: Any,
) -> None:
    """Dequantizes, masks and measures; see `trainer_client.qat.inject.inject`.

    Args:
        y: float32, flat: the FP32 values.
        q: int8, flat, in the same order: the NPU's codes.
        scale: float32, as all bounds: real value of one LSB.
        zero_point: code of real 0, as float32.
        limit: largest |noise| through which a gradient passes.
        low: int16: largest code that counts as clipped from below.
        high: int16: smallest code that counts as clipped from above.
        lower: bound that y is clamped to.
        upper: bound that y is clamped to.
        out: float32, flat, written: the dequantized values; may be y.
        mask: uint8, flat, written: 1 where the gradient passes.
        sums: float64 of shape (4,), written: sum y^2, sum n^2, sum |n|, max |n|.
        counts: int64 of shape (3,), written: masked (mismatch or clipped), clipped, passed.
    """
    clamped_buffer = np.empty(_BLOCK, np.float32)
    noise_buffer = np.empty(_BLOCK, np.float32)
    peak = np.zeros(1, np.int32)
    for start in range(0, y.size, _BLOCK):
        stop = min(start + _BLOCK, y.size)
        clamped, noise, codes = clamped_buffer[: stop - start], noise_buffer[: stop - start], q[start:stop]
        _clamp_block(y[start:stop], lower, upper, clamped)
        _dequantize_block(codes, clamped, scale, zero_point, out[start:stop], noise)
        _mask_block(codes, clamped, noise, limit, low, high, lower, upper, mask[start:stop])
        sums[0] += _energy(clamped)
        sums[1] += _energy(noise)
        sums[2] += _magnitude(noise)
        peak[0] = max(peak[0], _peak(noise))
        counts[0] += _count_mismatched(codes, noise, limit, low, high)
        counts[1] += _count_clipped(codes, low, high)
        counts[2] += _count_passed(mask[start:stop])
    sums[3] = peak.view(np.float32)[0]


# No fast-math in what yields values: every float32 operation rounds as in NumPy and torch.


@numba.njit(nogil=True, cache=True)
def _clamp_block(y: Any, lower: Any, upper: Any, clamped: Any) -> None:
    for i in range(y.size):
        bounded = lower if y[i] < lower else y[i]
        clamped[i] = upper if bounded > upper else bounded


@numba.njit(nogil=True, cache=True)
def _dequantize_block(q: Any, clamped: Any, scale: Any, zero_point: Any, out: Any, noise: Any) -> None:
    for i in range(q.size):
        real = (np.float32(q[i]) - zero_point) * scale
        out[i] = real
        noise[i] = real - clamped[i]


@numba.njit(nogil=True, cache=True)
def _mask_block(
    q: Any, clamped: Any, noise: Any, limit: Any, low: Any, high: Any, lower: Any, upper: Any, mask: Any
) -> None:
    for i in range(q.size):
        mask[i] = (
            (abs(noise[i]) <= limit)
            & (clamped[i] > lower)
            & (clamped[i] < upper)
            & (q[i] > low)
            & (q[i] < high)
        )


@numba.njit(nogil=True, cache=True)
def _count_passed(mask: Any) -> Any:
    passed = np.int32(0)
    for i in range(mask.size):
        passed += np.int32(mask[i])
    return passed


@numba.njit(nogil=True, cache=True)
def _count_mismatched(q: Any, noise: Any, limit: Any, low: Any, high: Any) -> Any:
    passed = np.int32(0)
    for i in range(q.size):
        passed += np.int32((abs(noise[i]) <= limit) & (q[i] > low) & (q[i] < high))
    return q.size - passed


@numba.njit(nogil=True, cache=True)
def _count_clipped(q: Any, low: Any, high: Any) -> Any:
    clipped = np.int32(0)
    for i in range(q.size):
        clipped += np.int32((q[i] <= low) | (q[i] >= high))
    return clipped


@numba.njit(nogil=True, cache=True)
def mask_pass(grad: Any, mask: Any, out: Any) -> None:
    """Writes grad where mask is 1 and 0 elsewhere into out; all flat and of one order."""
    for i in range(grad.size):
        out[i] = grad[i] if mask[i] else np.float32(0)


@numba.njit(nogil=True, cache=True)
def dequantize_pass(q: Any, scale: Any, zero_point: Any, out: Any) -> None:
    """Writes (q - zero_point) * scale into out; both flat and of one order, scale and zero point float32."""
    for i in range(q.size):
        out[i] = (np.float32(q[i]) - zero_point) * scale


@numba.njit(nogil=True, cache=True)
def gate_pass(grad: Any, q: Any, low: Any, high: Any, out: Any) -> None:
    """Writes grad where low < q < high (int16) and 0 elsewhere into out; all flat and of one order."""
    for i in range(grad.size):
        out[i] = grad[i] if (q[i] > low) & (q[i] < high) else np.float32(0)


# Statistics may be summed in any order, which is what vector instructions need; NaN and infinity stay legal.


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _energy(values: Any) -> Any:
    total = np.float32(0)
    for i in range(values.size):
        total += values[i] * values[i]
    return total


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _magnitude(values: Any) -> Any:
    total = np.float32(0)
    for i in range(values.size):
        total += abs(values[i])
    return total


@numba.njit(nogil=True, cache=True)
def _peak(values: Any) -> Any:
    # The bits of non-negative floats sort like integers, whose maximum vectorizes.
    bits = values.view(np.int32)
    peak = np.int32(0)
    for i in range(bits.size):
        peak = max(peak, bits[i] & np.int32(0x7FFFFFFF))
    return np.int32(peak)
