"""Data movement in torch. Tensors of rank 4 are (N, H, W, C) in memory, all others as their shape says."""

import torch
import torch.nn.functional as F

from npu_server.compile.graph import Interpolate, Rearrange, Select, Stuffing


def logical(x: torch.Tensor) -> torch.Tensor:
    """A view in the order of the layer map's shape."""
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def stored(x: torch.Tensor) -> torch.Tensor:
    """A tensor in logical order brought into its order in memory."""
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).contiguous()


def as_image(x: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) of an image; of a sequence (N, C, L) one row, of a vector (N, C) one pixel."""
    if x.ndim == 4:
        return x
    sequence = x if x.ndim == 3 else x.unsqueeze(2)
    return sequence.transpose(1, 2).unsqueeze(1).contiguous()


def from_image(image: torch.Tensor, rank: int) -> torch.Tensor:
    """The inverse of `as_image`.

    Args:
        image: (N, H, W, C).
        rank: of the result, batch included.
    """
    if rank == 4:
        return image
    sequence = image.squeeze(1).transpose(1, 2)
    return (sequence if rank == 3 else sequence.squeeze(2)).contiguous()


def rearrange(x: torch.Tensor, operator: Rearrange) -> torch.Tensor:
    """Splits axes and transposes, logical order in and out; the caller joins them again."""
    split = x.reshape(len(x), *operator.split)
    return split.permute(0, *(axis + 1 for axis in operator.order))


def select(x: torch.Tensor, operator: Select) -> torch.Tensor:
    """Takes some elements along some axes, logical order in and out."""
    for axis, indices in operator.indices:
        step = indices[1] - indices[0] if len(indices) > 1 else 1
        span = range(indices[0], indices[-1] + 1, step) if step > 0 else range(0)
        if indices in (span, tuple(span)):  # two ranges compare without being written down
            x = x[(slice(None),) * axis + (slice(span.start, span.stop, span.step),)]
        else:
            x = x.index_select(axis, torch.tensor(indices, device=x.device))
    return x


def pad(x: torch.Tensor, pads: tuple[tuple[int, int], ...], value: int) -> torch.Tensor:
    """Surrounds a tensor in logical order with a code."""
    flat = [n for pair in reversed(pads) for n in pair]
    return F.pad(x, flat, value=value)


def interpolate(image: torch.Tensor, operator: Interpolate) -> torch.Tensor:
    """Bilinear resize of (N, H, W, C); the specification's in int32, which holds 2^28."""
    one = 1 << 10
    rows, columns = operator.rows, operator.columns
    wide = image.to(torch.int32)

    def indices(values: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=image.device)

    down = indices(rows.weight).reshape(-1, 1, 1)
    across = indices(columns.weight).reshape(-1, 1)
    tall = (
        wide.index_select(1, indices(rows.lower)) * (one - down)
        + wide.index_select(1, indices(rows.upper)) * down
    )
    total = tall.index_select(2, indices(columns.lower)) * (one - across)
    total += tall.index_select(2, indices(columns.upper)) * across
    rounded = torch.sign(total) * ((total.abs() + (1 << 19)) >> 20)
    return rounded.to(torch.int8)


def stuff(image: torch.Tensor, stuffing: Stuffing, fill: int) -> torch.Tensor:
    """Spreads the pixels of (N, H, W, C) apart and surrounds them; negative pads cut off."""
    n, height, width, channels = image.shape
    (down, across), (top, left, bottom, right) = stuffing.strides, stuffing.pads
    size = ((height - 1) * down + 1, (width - 1) * across + 1)
    spread = torch.full((n, *size, channels), fill, dtype=image.dtype, device=image.device)
    spread[:, ::down, ::across] = image
    return F.pad(spread, (0, 0, left, right, top, bottom), value=fill).contiguous()
