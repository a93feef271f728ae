"""Exact sums -> INT8 codes: one pass over memory on a CPU (numba), plain torch on a GPU."""

import numba
import numpy as np
import torch

from npu_server.backends.emulator.packing import Requantizer


def requantize(sums: torch.Tensor, r: Requantizer) -> torch.Tensor:
    """Adds the bias, keeps what the register holds, multiplies, rounds, clamps.

    Args:
        sums: integer-valued float32 or float64, contiguous, shape (rows, channels).
        r: one entry a channel.

    Returns:
        int8, shape (rows, channels), in memory of its own.
    """
    return _requantize_numba(sums, r) if sums.device.type == "cpu" else requantize_torch(sums, r)


def requantize_torch(sums: torch.Tensor, r: Requantizer) -> torch.Tensor:
    """The same in torch, on any device."""
    limit = 1 << (r.accumulator_bits - 1)
    v = sums.to(torch.int64) + r.bias
    v = ((v + limit) & (2 * limit - 1)) - limit if r.wraps else v.clamp(-limit, limit - 1)
    if r.fixed_point:
        v = (v * r.mantissa + torch.where(v >= 0, r.nudge_positive, r.nudge_negative)) >> r.shift
    elif r.factor.dtype == torch.float32:
        v = torch.round(v.to(torch.float32) * r.factor).to(torch.int64)
    else:
        real = v.to(torch.float64) * r.factor
        v = (torch.trunc(real) + torch.trunc(2 * torch.frac(real))).to(torch.int64)
    return (v + r.zero_point).clamp(r.low, r.high).to(torch.int8)


def compile_kernels() -> None:
    """Compiles the numba kernels now, so that no batch waits for it."""
    one = torch.ones(1, dtype=torch.int64)
    for fixed_point, kind in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        factor = torch.ones(1, dtype=kind)
        r = Requantizer(fixed_point, one, one, one, one, one, factor, 32, True, 0, -128, 127)
        for dtype in (torch.int32, torch.float32, torch.float64):
            _requantize_numba(torch.ones((1, 1), dtype=dtype), r)


def _requantize_numba(sums: torch.Tensor, r: Requantizer) -> torch.Tensor:
    out = torch.empty(sums.shape, dtype=torch.int8)
    limit = 1 << (r.accumulator_bits - 1)
    tail = (limit, r.wraps, r.zero_point, r.low, r.high, out.numpy())
    if r.fixed_point:
        positive, negative = r.nudge_positive.numpy(), r.nudge_negative.numpy()
        fixed = (r.mantissa.numpy(), r.shift.numpy(), positive, negative - positive)
        _fixed_point(sums.numpy(), r.bias.numpy(), *fixed, *tail)
    else:
        kernel = _float32 if r.factor.dtype == torch.float32 else _float64
        kernel(sums.numpy(), r.bias.numpy(), r.factor.numpy(), *tail)
    return out


@numba.njit(inline="always")
def _register(v, limit, wraps):  # type: ignore[no-untyped-def]
    return ((v + limit) & (2 * limit - 1)) - limit if wraps else min(max(v, -limit), limit - 1)


# Written so that LLVM makes vectors of it, which a choice between two array elements would prevent: v >> 63
# has all bits set where v is negative, else none.


@numba.njit(nogil=True, cache=True)
def _fixed_point(  # type: ignore[no-untyped-def]
    sums, bias, mantissa, shift, nudge, nudge_step, limit, wraps, zero_point, low, high, out
):
    for row in range(sums.shape[0]):
        for c in range(sums.shape[1]):
            v = _register(np.int64(sums[row, c]) + bias[c], limit, wraps)
            v = ((v * mantissa[c] + nudge[c] + ((v >> 63) & nudge_step[c])) >> shift[c]) + zero_point
            out[row, c] = min(max(v, low), high)


@numba.njit(nogil=True, cache=True)
def _float32(sums, bias, factor, limit, wraps, zero_point, low, high, out):  # type: ignore[no-untyped-def]
    # A code beyond 2^24, where float32 no longer counts in ones, is far outside [low, high] anyway.
    zero_point, low, high = np.float32(zero_point), np.float32(low), np.float32(high)
    for row in range(sums.shape[0]):
        for c in range(sums.shape[1]):
            v = _register(np.int64(sums[row, c]) + bias[c], limit, wraps)
            out[row, c] = np.int32(min(max(np.rint(np.float32(v) * factor[c]) + zero_point, low), high))


@numba.njit(nogil=True, cache=True)
def _float64(sums, bias, factor, limit, wraps, zero_point, low, high, out):  # type: ignore[no-untyped-def]
    for row in range(sums.shape[0]):
        for c in range(sums.shape[1]):
            real = _register(np.int64(sums[row, c]) + bias[c], limit, wraps) * factor[c]
            whole = np.trunc(real)
            # Twice what is left is exact: 0, or one step away from zero.
            v = whole + np.trunc(2 * (real - whole)) + zero_point
            out[row, c] = np.int32(min(max(v, low), high))
