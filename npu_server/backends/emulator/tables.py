"""Functions of one code or of two as tables: one pass over memory on a CPU (numba), plain torch on a GPU."""

import numba
import torch


def look_up(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Entry code + 128 of a table, element by element.

    Args:
        table: int8, shape (256,).
        x: int8, any shape.

    Returns:
        int8, contiguous, shape of x.
    """
    if x.device.type != "cpu":
        return table[x.to(torch.int32) + 128]
    out = torch.empty(x.shape, dtype=torch.int8)
    _look_up(table.numpy(), x.contiguous().reshape(-1).numpy(), out.reshape(-1).numpy())
    return out


def look_up_pairs(table: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Entry (a + 128) * 256 + b + 128 of a table, element by element; a and b broadcast.

    Args:
        table: int8, shape (65536,).
        a: int8.
        b: int8.

    Returns:
        int8, contiguous, the shape that a and b have in common.
    """
    if a.device.type != "cpu":
        return table[((a.to(torch.int32) + 128) << 8) + (b.to(torch.int32) + 128)]
    a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
    out = torch.empty(a.shape, dtype=torch.int8)
    left, right = (x.contiguous().reshape(-1).numpy() for x in (a, b))
    _look_up_pairs(table.numpy(), left, right, out.reshape(-1).numpy())
    return out


def compile_tables() -> None:
    """Compiles the numba kernels now, so that no batch waits for it."""
    code = torch.zeros(1, dtype=torch.int8)
    look_up(torch.zeros(256, dtype=torch.int8), code)
    look_up_pairs(torch.zeros(65536, dtype=torch.int8), code, code)


@numba.njit(nogil=True, cache=True)
def _look_up(table, x, out):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        out[i] = table[x[i] + 128]


@numba.njit(nogil=True, cache=True)
def _look_up_pairs(table, a, b, out):  # type: ignore[no-untyped-def]
    for i in range(a.size):
        out[i] = table[(a[i] + 128) * 256 + b[i] + 128]
